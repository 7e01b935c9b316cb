"""StepRunner: the one place where a method's step meets the tokens of items, at the tower's side and at the LM's.

Items are grouped so that views are dense; what a step returns is checked, recorded, and handed to the caller, who moves
the rows.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Action, Emit, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.item_tokens import ItemTokens

EMITS = ("projected", "layers")  # where tokens can be emitted: rows there are as wide as the LM


@dataclass(frozen=True, eq=False)
class Change:
    """What a step did to one item.

    Attributes:
        item: in the coordinates after the step.
        reduction: of this item alone.
        rows: `[m, D]` the new rows; None where they are old ones in their own order.
        separators: whether the item's separators stay.
        log_bias: `[m]` what is added to the attention logits of each new row as a key.
    """

    item: ItemTokens
    reduction: Reduction
    rows: Tensor | None
    separators: bool
    log_bias: Tensor | None = None


class StepRunner:
    """Runs the steps of one request.

    Args:
        plan: bound to the model.
        note: takes what steps record.
        train: whether gradients flow through steps; off, they run without.
        memory: number of a method → its `State.request`, where requests are parts of one stream: what it holds is
            seen, and what a step leaves is put there.
    """

    def __init__(
        self,
        plan: BoundPlan,
        note: Callable[[dict[str, Any]], None],
        train: bool = False,
        memory: dict[int, dict[str, Any]] | None = None,
    ) -> None:
        self.plan, self.note, self.train, self.memory = plan, note, train, memory

    def run(
        self, number: int, step: Step, items: Sequence[ItemTokens], tokens: Callable[[list[Any]], Tensor]
    ) -> list[Change]:
        """Run a step on all items that have tokens left and that its method acts on.

        Args:
            number: of the step's method in the plan.
            tokens: the rows of a group of items, `[b, N, D]`.
        """
        method = self.plan.resolved.methods[number]
        changes: list[Change] = []
        own = [item for item in items if item.count and self.plan.acts_on(number, item.record.modality)]
        for group in _groups(own, number, method.streaming, step.needs):
            view = self._view(group, number, step, tokens(group))
            state = _joined([item.states.get(number, State()) for item in group])
            if method.streaming and self.memory is not None:
                state = replace(state, request=self.memory.get(number, {}))
            with self._gradients():
                action, after = step.act(view, state)
            if method.streaming and self.memory is not None:
                self.memory[number] = after.request
            self.note(view.notes)
            for item, state in zip(group, _split(after, len(group)), strict=True):
                item.states[number] = state
            if isinstance(action, Observe):
                continue
            changes += self._changes(group, view, action, step, method.slug)
        return changes

    def _gradients(self) -> AbstractContextManager[Any]:
        return torch.set_grad_enabled(self.train and torch.is_grad_enabled())

    def _view(self, group: list[ItemTokens], number: int, step: Step, tokens: Tensor) -> View:
        first = group[0]
        return View(
            tokens,
            first.layout,
            torch.stack([item.ids for item in group]),
            first.n_visual,
            step.signals(lambda signal: torch.stack([_signal(item, signal) for item in group])),
            seed=self.plan.plan.seed,
            module=self.plan.modules.get(number),
            n_lm=first.n_lm,
        )

    def _changes(self, group: list[ItemTokens], view: View, action: Action, step: Step, slug: str) -> list[Change]:
        made, action = _emitted(action, view, step, slug)
        reduction = action.reduction
        if made is None and not (reduction.is_selection and reduction.ordered):
            made = reduction.apply(view.tokens)
        changes = []
        for lane, item in enumerate(group):
            own = reduction.lane(lane)
            item.follow(own)
            item.record.reductions.append((str(step.at), slug, own))
            rows = None if made is None else made[lane, : own.m]
            bias = None if action.log_bias is None else action.log_bias[lane, : own.m]
            changes.append(Change(item, own, rows, action.separators == "keep" and own.m > 0, bias))
        return changes


def _groups(
    items: Iterable[ItemTokens], number: int, streaming: bool, needs: Sequence[Signal] = ()
) -> list[list[ItemTokens]]:
    """Items of equal length, layout, remembered fields and shapes of signals, which can be one dense view.

    Views of a streaming method never join samples, because what it remembers of a request belongs to one. Questions of
    unequal lengths give signals of unequal shapes.
    """
    found: dict[Any, list[ItemTokens]] = {}
    for item in items:
        state = item.states.get(number, State())
        fields = tuple(tuple(sorted(kind)) for kind in (state.token, state.item, state.summed))
        shapes = tuple(item.signals[s].shape for s in needs if s in item.signals)
        key = (item.count, item.layout, item.n_visual, item.n_lm, fields, shapes, item.row if streaming else None)
        found.setdefault(key, []).append(item)
    return list(found.values())


def _joined(states: list[State]) -> State:
    """The states of a group as one, `b` first."""

    def cat(name: str) -> dict[str, Tensor]:
        return {k: torch.cat([getattr(s, name)[k] for s in states]) for k in getattr(states[0], name)}

    return State(cat("token"), cat("item"), states[0].request, cat("summed"))


def _split(state: State, b: int) -> list[State]:
    """The state of each item, with a leading axis of one."""

    def lane(fields: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return {k: v[i : i + 1] for k, v in fields.items()}

    return [State(lane(state.token, i), lane(state.item, i), state.request, lane(state.summed, i)) for i in range(b)]


def _signal(item: ItemTokens, signal: Any) -> Tensor:
    if signal not in item.signals:
        raise WinnowError(
            f"{signal} was not recorded. Either these encoder outputs were made without this plan (encode under it: "
            "pass the pixels, or make the outputs inside the same `using`), or the module that shows it does not "
            "attend through transformers' attention functions."
        )
    return item.signals[signal]


def _emitted(action: Action, view: View, step: Step, slug: str) -> tuple[Tensor | None, Reduce]:
    """New rows, where a step emits them, and the reduction that says whose places they take."""
    if not isinstance(action, Emit):
        return None, _checked(action, view, step, slug)
    if step.at.name not in EMITS:
        raise UnsupportedError(
            f"{slug} emits new tokens at {step.at}, which the engine does not do yet; it does at {' and '.join(EMITS)}."
        )
    if action.provenance is None or action.layout is not None:
        raise UnsupportedError(
            f"{slug} emits tokens with a layout of their own, which the engine does not do yet; give a provenance, "
            "whose representatives say which places they take, and no layout."
        )
    reduce = _checked(Reduce(action.provenance, action.separators), view, step, slug)
    wanted = (view.b, action.provenance.m, view.tokens.shape[-1])
    if action.tokens.shape != wanted:
        raise WinnowError(
            f"{slug} emitted tokens of shape {tuple(action.tokens.shape)}; its provenance and its view say {wanted}."
        )
    return action.tokens, reduce


def _checked(action: Any, view: View, step: Step, slug: str) -> Reduce:
    """A reduction must fit its view. That indices are in range is tested for each method."""
    if not isinstance(action, Reduce):
        raise UnsupportedError(
            f"{slug} asks for {type(action).__name__} at {step.at}, which the engine does not do yet."
        )
    reduction = action.reduction
    if action.log_bias is not None and step.at.name != "blocks":
        raise UnsupportedError(
            f"{slug} asks for an attention bias at {step.at}, which the engine does not do yet; it does at blocks."
        )
    if action.log_bias is not None and action.log_bias.shape != (view.b, reduction.m):
        raise WinnowError(
            f"{slug} returned a log_bias of shape {tuple(action.log_bias.shape)} for {view.b} × {reduction.m} outputs."
        )
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
    return action
