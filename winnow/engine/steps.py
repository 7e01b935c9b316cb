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


def groups(items: Iterable[Item], number: int) -> list[list[Item]]:
    """Items of equal length, layout and remembered fields, which can be one dense view."""
    found: dict[Any, list[Item]] = {}
    for item in items:
        state = item.states.get(number, State())
        key = (item.count, item.layout, item.record.entry, tuple(sorted(state.token)), tuple(sorted(state.item)))
        found.setdefault(key, []).append(item)
    return list(found.values())


def joined(states: list[State]) -> State:
    """The states of a group as one, `b` first."""
    first = states[0]
    return State(
        {k: torch.cat([s.token[k] for s in states]) for k in first.token},
        {k: torch.cat([s.item[k] for s in states]) for k in first.item},
        first.request,
    )


def split(state: State, b: int) -> list[State]:
    """The state of each item, with a leading axis of one."""
    return [
        State(
            {k: v[i : i + 1] for k, v in state.token.items()},
            {k: v[i : i + 1] for k, v in state.item.items()},
            state.request,
        )
        for i in range(b)
    ]


def carried(state: State, anchors: Tensor) -> State:
    """Per-token fields after a reduction: an output has what its anchor had."""

    def take(x: Tensor) -> Tensor:
        index = anchors.reshape(*anchors.shape, *(1,) * (x.ndim - 2)).expand(*anchors.shape, *x.shape[2:])
        return x.gather(1, index)

    return State({k: take(v) for k, v in state.token.items()}, state.item, state.request)


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
