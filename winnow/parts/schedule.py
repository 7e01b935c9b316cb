"""Schedules of cuts: budgets that go down in equal steps."""

from winnow.core.budget import Budget


def steps_down_to(last: Budget, cuts: int, content: int) -> tuple[Budget, ...]:
    """Budgets of `cuts` cuts, each the same share of the one before, that end with `last`.

    Args:
        content: content tokens of a typical item.
    """
    parts = [float(last.share(content)) ** ((cut + 1) / cuts) for cut in range(cuts - 1)]
    least = max(1, last.of(content))
    steps = [max(least, round(part * content)) if last.is_count else f"{100 * max(part, 1e-6):.6g}%" for part in parts]
    return (*(Budget(step, rounding=last.rounding) for step in steps), last)
