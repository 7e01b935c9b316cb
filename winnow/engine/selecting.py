"""What a step ahead of the processor may ask for: some of what it saw, in their order."""

from typing import Any

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.reduction import Reduction
from winnow.core.step import Reduce, State, Step


def selection(action: Any, n: int, step: Step, slug: str, things: str) -> tuple[Reduction, list[int]]:
    """The map of one view, and what it picks.

    Args:
        n: how many the step saw.
        things: what they are, in the plural.

    Raises:
        UnsupportedError: the step asked for anything but a selection in order.
        WinnowError: it picks nothing, or what is not there.
    """
    if not isinstance(action, Reduce):
        raise UnsupportedError(f"{slug} asked for {type(action).__name__} at {step.at}: {things} are chosen by Reduce.")
    reduction = action.reduction
    if not reduction.is_selection or not reduction.ordered:
        raise UnsupportedError(f"{slug} merges or reorders {things} at {step.at}; there, they can only be selected.")
    own = (reduction.lane(0) if reduction.lanes else reduction).cpu()
    chosen: list[int] = own.index.tolist()  # type: ignore[union-attr]
    if own.n != n or not chosen or sorted(set(chosen)) != chosen or chosen[0] < 0 or chosen[-1] >= n:
        raise WinnowError(f"{slug} chose the {things} {chosen} of {n}; give ascending indices, and at least one.")
    return own, chosen


def followed(state: State, chosen: list[int]) -> State:
    """Token fields `[1, N, …]` are those of what is left."""
    token = {name: value[:, chosen] for name, value in state.token.items()}
    return State(token, state.item, state.request, {name: value[:, chosen] for name, value in state.summed.items()})
