"""What methods remember of the slots of one layer, kept in step with them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from winnow.cache.groups import Group, at_slots
from winnow.core.errors import UnsupportedError
from winnow.core.reduction import Reduction
from winnow.core.step import State


class Memory:
    """States by method and group. Token fields are `[b, G, n, …]`; slots that came since count as zeros."""

    def __init__(self) -> None:
        self._states: dict[tuple[int, Any], State] = {}

    def of(self, number: int, group: Group, n: int) -> State:
        """What a method remembers of a group that holds n slots now."""
        found = self._states.get((number, group.key)) or self._regrouped(number, group)
        return State() if found is None else _each_token(found, lambda x: _grown(x, n))

    def put(self, number: int, group: Group, state: State) -> None:
        if state.token or state.item or state.request or state.summed:
            self._states[number, group.key] = state
        else:
            self._states.pop((number, group.key), None)

    def reduce(self, numbers: Iterable[int], group: Group, chosen: Reduction) -> None:
        """Slots of a group were dropped or merged: what methods remember goes with them."""
        at = chosen.representatives
        for number in numbers:
            state = self._states.get((number, group.key))
            if state is not None:
                summed = {name: _sums(_grown(x, chosen.n), chosen) for name, x in state.summed.items()}
                token = {name: at_slots(_grown(x, chosen.n), at) for name, x in state.token.items()}
                self._states[number, group.key] = State(token, state.item, state.request, summed)

    def split(self, group: Group, counts: tuple[int, ...], heads: int, ragged: bool) -> None:
        """A group whose lanes hold unequal numbers from now on: one state for the heads of each length.

        Args:
            ragged: whether heads of one sample do; else the heads of a sample stay together.
        """
        for number, key in [key for key in self._states if key[1] == group.key]:
            state = self._states.pop((number, key))
            names = group.heads or tuple(range(heads))
            for lane, row in enumerate(group.rows):
                own = counts[lane * len(names) : (lane + 1) * len(names)]
                for n in set(own):
                    at = [i for i, count in enumerate(own) if count == n]
                    part = _each_token(state, lambda x, lane=lane, at=at, n=n: x[lane : lane + 1, at, :n])  # type: ignore[misc]
                    item = {name: x[lane : lane + 1] for name, x in state.item.items()}
                    made = State(part.token, item, state.request, part.summed)
                    own_heads = tuple(names[i] for i in at) if ragged else None
                    self._states[number, ((row,), own_heads)] = made

    def crop(self, n: int) -> None:
        """The last slots were taken back; n are left."""
        self._states = {key: _each_token(state, lambda x: x[:, :, :n]) for key, state in self._states.items()}

    def move(self, order: list[int]) -> None:
        """Samples were chosen, repeated or reordered."""
        moved: dict[tuple[int, Any], State] = {}
        for number in {number for number, _ in self._states}:
            for new, old in enumerate(order):
                found = self._rows(number, (old,))
                if found is None:
                    raise UnsupportedError(
                        "the samples of a cache whose heads hold unequal numbers of slots, and are remembered, do not "
                        "move (beams do so); use greedy or sampled decoding."
                    )
                moved[number, ((new,), None)] = found
        self._states = moved

    def tensors(self) -> Iterator[Tensor]:
        for state in self._states.values():
            for own in (state.token, state.summed, state.item):
                yield from own.values()

    def _regrouped(self, number: int, group: Group) -> State | None:
        """States of samples that were of other groups before."""
        if group.heads is not None or not any(key[0] == number for key in self._states):
            return None
        found = self._rows(number, group.rows)
        if found is not None:
            for key in [k for k in self._states if k[0] == number and set(k[1][0]) <= set(group.rows)]:
                del self._states[key]
        return found

    def _rows(self, number: int, rows: tuple[int, ...]) -> State | None:
        parts = []
        for row in rows:
            own = [
                (k[1][0], s) for k, s in self._states.items() if k[0] == number and k[1][1] is None and row in k[1][0]
            ]
            if not own:
                return None
            at = own[0][0].index(row)
            state = own[0][1]
            fields = [{name: x[at : at + 1] for name, x in f.items()} for f in (state.token, state.item, state.summed)]
            parts.append(State(fields[0], fields[1], state.request, fields[2]))
        return _joined(parts)


def _each_token(state: State, change: Callable[[Tensor], Tensor]) -> State:
    token = {name: change(x) for name, x in state.token.items()}
    return State(token, state.item, state.request, {name: change(x) for name, x in state.summed.items()})


def _grown(x: Tensor, n: int) -> Tensor:
    if x.shape[2] >= n:
        return x[:, :, :n]
    return torch.cat([x, x.new_zeros(*x.shape[:2], n - x.shape[2], *x.shape[3:])], 2)


def _sums(x: Tensor, chosen: Reduction) -> Tensor:
    """The sum over what feeds each output."""
    if chosen.is_selection:
        return at_slots(x, chosen.representatives)
    return ((chosen.to_matrix() != 0).to(x.dtype) @ x[..., None])[..., 0]


def _joined(parts: list[State]) -> State:
    """States of single samples as one; those of shorter samples lie at the end, like their slots."""

    def cat(fields: list[dict[str, Tensor]], per_slot: bool) -> dict[str, Tensor]:
        made = {}
        for name in fields[0]:
            own = [field[name] for field in fields]
            n = max(x.shape[2] for x in own) if per_slot else 0
            made[name] = torch.cat([_behind(x, n) if per_slot else x for x in own])
        return made

    if len(parts) == 1:
        return parts[0]
    token, summed = (cat([getattr(part, name) for part in parts], True) for name in ("token", "summed"))
    return State(token, cat([part.item for part in parts], False), parts[0].request, summed)


def _behind(x: Tensor, n: int) -> Tensor:
    return x if x.shape[2] == n else torch.cat([x.new_zeros(*x.shape[:2], n - x.shape[2], *x.shape[3:]), x], 2)
