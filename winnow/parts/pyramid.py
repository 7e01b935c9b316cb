"""A pyramid of budgets: layers low in a model get more, those high up less, and all together as much as without it."""


def pyramid(
    n: float, window: int, depth: int, beta: float, most: int | None = None, *, clamp: bool = True
) -> tuple[int, ...]:
    """Slots for each layer, falling in equal steps from the first to the last; the window is among them.

    Args:
        n: slots that a layer has on average; it need not be whole.
        window: slots at the end that each layer keeps, so that no layer gets fewer.
        depth: layers.
        beta: how many times the average is above what the last layer gets; 1 is no pyramid.
        most: slots that there are; the first layer gets at most those before the window.
        clamp: whether a last layer that would get less than the window gets the window, and the first one so much
            less; otherwise all layers get the same then. All get the same as well where that does not help.
    """
    last = n / beta
    if clamp:
        last = max(last, float(window))
    first = 2 * n - last
    if most is not None and first >= most - window:
        first = float(most - window)
        last = 2 * n - first
    if depth < 2 or not first >= last >= window:
        return (round(n),) * depth
    step = (first - last) / (depth - 1)
    return tuple(round(first - layer * step) for layer in range(depth))
