"""What methods remember of the slots of one layer, kept in step with them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from winnow.cache.groups import Group, at_slots
from winnow.core.reduction import Reduction
from winnow.core.step import State


class Memory:
    """States by method and group. Token fields are `[b, G, n, …]`; slots that came since count as zeros."""

    def __init__(self) -> None:
        self._states: dict[tuple[int, Any], State] = {}

    def of(self, number: int, group: Group, n: int) -> State:
        """What a method remembers of a group that holds n slots now."""
        found = self._find(number, group)
        return State() if found is None else _each_token(found, lambda x: _grown(x, n))

    def put(self, number: int, group: Group, state: State) -> None:
        if state.token or state.item or state.request or state.summed:
            self._states[number, group.key] = state
        else:
            self._states.pop((number, group.key), None)

    def reduce(self, numbers: Iterable[int], group: Group, at: Tensor, values: Reduction) -> None:
        """Slots of a group were dropped or merged: what methods remember goes with them.

        Args:
            at: `[b, G, m]` the slot whose place each output takes.
            values: the map of the values, over whose sources summed fields add up.
        """
        for number in numbers:
            state = self._find(number, group)
            if state is not None:
                summed = {name: _sums(_grown(x, values.n), values) for name, x in state.summed.items()}
                token = {name: at_slots(_grown(x, values.n), at) for name, x in state.token.items()}
                self._states[number, group.key] = State(token, state.item, state.request, summed)

    def split(self, group: Group, counts: tuple[int, ...], heads: int, ragged: bool) -> None:
        """A group whose lanes hold their own numbers from now on: one state for the heads of each length.

        Args:
            ragged: whether heads of one sample do; else the heads of a sample stay together.
        """
        for number in {number for number, _ in self._states}:
            state = self._find(number, group)
            if state is None:
                continue
            del self._states[number, group.key]
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
                by_heads = [(key, s) for key, s in self._states.items() if key[0] == number and key[1][0] == (old,)]
                for key, state in by_heads:
                    moved[number, ((new,), key[1][1])] = state
                found = None if by_heads else self._rows(number, (old,))
                if found is not None:
                    moved[number, ((new,), None)] = found
        self._states = moved

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of each tensor that is remembered in its place."""

        def changed(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(x) for name, x in fields.items()}

        self._states = {
            key: State(changed(own.token), changed(own.item), own.request, changed(own.summed))
            for key, own in self._states.items()
        }

    def tensors(self) -> Iterator[Tensor]:
        for state in self._states.values():
            for own in (state.token, state.summed, state.item):
                yield from own.values()

    def _find(self, number: int, group: Group) -> State | None:
        """What a method remembers of a group; gathered from other groups, where its members were of those before."""
        found = self._states.get((number, group.key))
        if found is not None or not any(key[0] == number for key in self._states):
            return found
        if group.heads is not None:
            found = self._heads(number, group.rows[0], group.heads)
            if found is not None:
                self._take_out(number, group.rows[0], group.heads)
                self._states[number, group.key] = found
            return found
        found = self._rows(number, group.rows)
        if found is not None:
            for key in [k for k in self._states if k[0] == number and set(k[1][0]) <= set(group.rows)]:
                del self._states[key]
            self._states[number, group.key] = found
        return found

    def _heads(self, number: int, row: int, heads: tuple[int, ...]) -> State | None:
        """The state of some heads of a sample, which hold as many slots now and did not before."""
        parts, item = [], None
        for head in heads:
            own = [(k[1][1], s) for k, s in self._states.items() if k[0] == number and (row,) == k[1][0]]
            held = next(((names, s) for names, s in own if names is not None and head in names), None)
            if held is None:
                return None
            at, item = held[0].index(head), held[1]
            parts.append(_each_token(held[1], lambda x, at=at: x[:, at : at + 1]))  # type: ignore[misc]
        n = max((x.shape[2] for part in parts for x in part.token.values()), default=0)
        n = max([n, *(x.shape[2] for part in parts for x in part.summed.values())])
        parts = [_each_token(part, lambda x: _grown(x, n)) for part in parts]
        whole = [{name: torch.cat([getattr(p, kind)[name] for p in parts], 1) for name in getattr(parts[0], kind)}
                 for kind in ("token", "summed")]  # fmt: skip
        return State(whole[0], item.item, item.request, whole[1])  # type: ignore[union-attr]

    def _take_out(self, number: int, row: int, heads: tuple[int, ...]) -> None:
        """Some heads of a sample are of another group from now on."""
        for key in [k for k in self._states if k[0] == number and k[1][0] == (row,) and k[1][1] is not None]:
            names = key[1][1]
            rest = [i for i, head in enumerate(names) if head not in heads]
            if len(rest) == len(names):
                continue
            state = self._states.pop(key)
            if rest:
                left = _each_token(state, lambda x, rest=rest: x[:, rest])  # type: ignore[misc]
                self._states[number, ((row,), tuple(names[i] for i in rest))] = left

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
    """The sum over what feeds each output; `[b, G, m, …]` of `[b, G, n, …]`."""
    if chosen.is_selection:
        return at_slots(x, chosen.representatives)
    if chosen.matrix is not None:
        sums = (chosen.matrix != 0).to(x.dtype) @ x.reshape(*x.shape[:3], -1)
        return sums.reshape(*sums.shape[:3], *x.shape[3:])
    feeds = chosen.target >= 0  # type: ignore[operator]
    if chosen.weight is not None:
        feeds &= chosen.weight != 0
    to = torch.where(feeds, chosen.target, chosen.m)  # type: ignore[arg-type]
    rows = at_slots(x, chosen.index)  # type: ignore[arg-type]
    to = to.reshape(*to.shape, *(1,) * (x.ndim - 3)).expand_as(rows)
    return x.new_zeros(*x.shape[:2], chosen.m + 1, *x.shape[3:]).scatter_add(2, to, rows)[:, :, : chosen.m]


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
