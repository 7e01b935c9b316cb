"""Running steps: items are grouped so that views are dense, and what a step returns is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.reduction import Reduction
from winnow.core.step import Keep, Reduce, State, Step
from winnow.core.view import View
from winnow.engine.items import Item


def groups(items: Iterable[Item], number: int, streaming: bool) -> list[list[Item]]:
    """Items of equal length, layout and remembered fields, which can be one dense view.

    Views of a streaming method never join samples, because what it remembers of a request belongs to one.
    """
    found: dict[Any, list[Item]] = {}
    for item in items:
        state = item.states.get(number, State())
        fields = tuple(tuple(sorted(kind)) for kind in (state.token, state.item, state.summed))
        key = (item.count, item.layout, item.record.entry, item.entered, fields, item.row if streaming else None)
        found.setdefault(key, []).append(item)
    return list(found.values())


def joined(states: list[State]) -> State:
    """The states of a group as one, `b` first."""

    def cat(name: str) -> dict[str, Tensor]:
        return {k: torch.cat([getattr(s, name)[k] for s in states]) for k in getattr(states[0], name)}

    return State(cat("token"), cat("item"), states[0].request, cat("summed"))


def split(state: State, b: int) -> list[State]:
    """The state of each item, with a leading axis of one."""

    def lane(fields: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return {k: v[i : i + 1] for k, v in fields.items()}

    return [State(lane(state.token, i), lane(state.item, i), state.request, lane(state.summed, i)) for i in range(b)]


def carried(state: State, reduction: Reduction) -> State:
    """What a method remembers of one item after a reduction, its own or another's.

    Per-token fields go with the anchors; summed fields add up over the sources that feed an output.
    """

    def take(x: Tensor) -> Tensor:
        return x[:, reduction.anchors]

    def add(x: Tensor) -> Tensor:
        feeds = (reduction.to_matrix() != 0).to(x.dtype)
        return (feeds @ x.flatten(2) if x.ndim > 2 else x @ feeds.T).reshape(x.shape[0], reduction.m, *x.shape[2:])

    return State(
        {k: take(v) for k, v in state.token.items()},
        state.item,
        state.request,
        {k: add(v) for k, v in state.summed.items()},
    )


def act(
    step: Step, slug: str, view: View, state: State, merge: Callable[[dict[str, Any]], None]
) -> tuple[Reduce | None, State]:
    """Run a step and check what it asks for; None: nothing changes here."""
    action, after = step.run(view, state)
    merge(view.notes)
    if isinstance(action, Keep):
        return None, after
    if not isinstance(action, Reduce):
        raise UnsupportedError(
            f"{slug} asks for {type(action).__name__} at {step.at}, which the engine does not do yet."
        )
    if action.log_bias is not None:
        raise UnsupportedError(f"{slug} asks for an attention bias at {step.at}, which the engine does not do yet.")
    check(action.reduction, view, slug)
    return action, after


def check(reduction: Reduction, view: View, slug: str) -> None:
    """A reduction must fit its view. Whether indices are in range is the method's promise, tested for each method."""
    lanes = tuple(reduction.lanes)
    if reduction.n != view.n or lanes != (view.b,):
        raise WinnowError(
            f"{slug} returned a reduction of {reduction.n} tokens and lanes {lanes} "
            f"for a view of {view.b} × {view.n} tokens."
        )
    if reduction.m > reduction.n:
        raise WinnowError(f"{slug} returned {reduction.m} rows from {reduction.n} tokens; a Reduce cannot add tokens.")
    if reduction.counts is not None and (len(reduction.counts) != view.b or max(reduction.counts) > reduction.m):
        raise WinnowError(
            f"{slug} returned counts {reduction.counts} for {view.b} items of at most {reduction.m} rows."
        )
