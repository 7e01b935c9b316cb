"""Joining: what the steps of all groups of a layer answered becomes its store."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.cache.dense import Dense
from winnow.cache.groups import Group
from winnow.cache.ragged import Ragged


@dataclass(frozen=True, eq=False)
class Part:
    """What is left of a group: keys and values `[b, G, m, d]`, slots and bias `[b, G, m]`.

    Attributes:
        counts: slots of each lane (sample-major), where lanes hold unequal numbers.
    """

    group: Group
    keys: Tensor
    values: Tensor
    slots: Tensor
    bias: Tensor | None = None
    counts: tuple[int, ...] | None = None

    @property
    def unequal_heads(self) -> bool:
        """Whether the heads of a sample hold unequal numbers, and not samples alone."""
        if self.counts is None:
            return False
        each = len(self.counts) // len(self.group.rows)
        return any(len(set(self.counts[i : i + each])) > 1 for i in range(0, len(self.counts), each))

    def samples(self) -> "list[Part]":
        """The part of each sample, where they hold unequal numbers."""
        if self.counts is None:
            return [self]
        each = len(self.counts) // len(self.group.rows)
        found = []
        for i, row in enumerate(self.group.rows):
            own = (self.keys, self.values, self.slots, self.bias)
            k, v, slots, bias = (None if x is None else x[i : i + 1, :, : self.counts[i * each]] for x in own)
            found.append(Part(Group((row,)), k, v, slots, bias))  # type: ignore[arg-type]
        return found


def joined(parts: list[Part], heads: int, ragged: bool) -> Dense | Ragged:
    """The store of a layer.

    Args:
        heads: KV heads of the layer.
        ragged: whether the heads of a sample hold unequal numbers.
    """
    if ragged:
        return _ragged(parts, heads)
    parts = [own for part in parts for own in part.samples()]
    if len(parts) == 1:
        only = parts[0]
        return Dense(only.keys, only.values, None, only.bias, only.slots.to(torch.int32), grows=True)
    rows, m = sum(len(part.group.rows) for part in parts), max(part.keys.shape[2] for part in parts)
    first = parts[0]
    keys, values = (x.new_zeros(rows, x.shape[1], m, x.shape[3]) for x in (first.keys, first.values))
    slots = torch.zeros(rows, heads, m, dtype=torch.int32, device=keys.device)
    weighted = any(part.bias is not None for part in parts)
    bias = torch.zeros(rows, heads, m, device=keys.device) if weighted else None
    real = torch.zeros(rows, m, dtype=torch.bool, device=keys.device)
    for part in parts:
        at, start = torch.tensor(part.group.rows, device=keys.device), m - part.keys.shape[2]
        keys[at, :, start:], values[at, :, start:] = part.keys, part.values
        slots[at, :, start:], real[at, start:] = part.slots.to(torch.int32), True
        if bias is not None and part.bias is not None:
            bias[at, :, start:] = part.bias.float()
    return Dense(keys, values, None if bool(real.all()) else real, bias, slots, grows=True)


def _ragged(parts: list[Part], heads: int) -> Ragged:
    weighted = any(part.bias is not None for part in parts)
    lanes: dict[tuple[int, int], Any] = {}
    for part in parts:
        names = part.group.heads or tuple(range(heads))
        for i, row in enumerate(part.group.rows):
            for j, head in enumerate(names):
                n = part.keys.shape[2] if part.counts is None else part.counts[i * len(names) + j]
                bias = None
                if weighted:
                    bias = torch.zeros(n, device=part.keys.device) if part.bias is None else part.bias[i, j, :n]
                own = (part.keys, part.values, part.slots.to(torch.int32))
                lanes[row, head] = (*(x[i, j, :n] for x in own), bias)
    return Ragged.of([lanes[key] for key in sorted(lanes)], heads, weighted)
