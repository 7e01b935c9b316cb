"""Units of a video in a prompt: so many visual tokens each, told by what each slot is, and what attends to what.

The visual span goes from the first visual token of a prompt to the last. Text in it (times, newlines) is a mark.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

VISUAL = (1, 2)  # kinds of slots: picture, video


class Units(NamedTuple):
    """The units of one sample.

    Attributes:
        slot: `[V]` of each visual token, ascending.
        unit: `[V]` that it belongs to, from 0.
        place: `[V]` in its unit, from 0.
        n: slots of the sample.
    """

    slot: Int[Tensor, " v"]
    unit: Int[Tensor, " v"]
    place: Int[Tensor, " v"]
    n: int

    @staticmethod
    def of(kinds: Int[Tensor, " n"], size: int) -> "Units":
        """Units of `size` visual tokens; the last one may have fewer."""
        visual = (kinds == VISUAL[0]) | (kinds == VISUAL[1])
        slot = visual.nonzero()[:, 0]
        number = torch.arange(len(slot), device=slot.device)
        return Units(slot, torch.div(number, size, rounding_mode="floor"), number % size, len(kinds))

    @property
    def number(self) -> int:
        return 0 if not len(self.unit) else int(self.unit[-1]) + 1

    @property
    def span(self) -> tuple[int, int]:
        """The first slot of the visual span, and the first behind it."""
        return (int(self.slot[0]), int(self.slot[-1]) + 1) if len(self.slot) else (self.n, self.n)

    @property
    def marks(self) -> Int[Tensor, " t"]:
        """Slots of the text in the span."""
        first, end = self.span
        inside = torch.zeros(self.n, dtype=torch.bool, device=self.slot.device)
        inside[first:end] = True
        inside[self.slot] = False
        return inside.nonzero()[:, 0]


Part = tuple[Tensor, Tensor]


def chunked(units: Units, block: int, previous: int) -> tuple[Part, ...]:
    """Rows up to the end of the visual span, each with the slots that it reads among those before it.

    Visual rows read all text before them, their own block of units, and the blocks right before it; text reads all.

    Args:
        block: units of a block; 0: all are one.
        previous: blocks that a block reads beside itself.
    """
    first, device = units.span[0], units.slot.device
    ahead = torch.arange(first, device=device)
    parts: list[Part] = [(ahead, ahead)] if first else []
    marks, size = units.marks, block or max(1, units.number)
    blocks = torch.div(units.unit, size, rounding_mode="floor")
    for number in range(-(-units.number // size)):
        own = units.slot[blocks == number]
        seen = units.slot[(blocks <= number) & (blocks >= number - previous)]
        words = torch.cat([ahead, marks[marks < int(own[-1])]])
        parts.append((own, torch.cat([words, seen]).sort().values))
    if len(marks):
        parts.append((marks, torch.arange(int(marks[-1]) + 1, device=device)))
    return tuple(parts)


def allowed(units: Units, block: int, previous: int) -> Bool[Tensor, "n n"]:
    """Which slot reads which, the rows behind the visual span included: the mask that `chunked` is the parts of."""
    first, end = units.span
    at = torch.arange(units.n, device=units.slot.device)
    number = torch.full((units.n,), -1, device=at.device)
    number[units.slot] = torch.div(units.unit, block or max(1, units.number), rounding_mode="floor")
    apart = number[:, None] - number
    text = number < 0
    near = (apart >= 0) & (apart <= previous)
    behind = at >= end
    return (at <= at[:, None]) & (near | text | text[:, None] | behind[:, None] | (at < first))


def entries_of(parts: tuple[Part, ...]) -> tuple[int, int]:
    """Entries of the attention matrix that parts allow, and those of the lower triangle of their rows."""
    read = whole = 0
    for rows, slots in parts:
        read += int((slots <= rows[:, None]).sum())
        whole += int((rows + 1).sum())
    return read, whole


class Levels(NamedTuple):
    """A cache in two resolutions, of one sample.

    Attributes:
        target: `[n]` the output of each slot.
        weight: `[n]` of each slot in it.
        first: `[m]` the first slot of each output.
    """

    target: Int[Tensor, " n"]
    weight: Tensor
    first: Int[Tensor, " m"]


def two_levels(units: Units, dense: Bool[Tensor, " n"], step: int) -> Levels:
    """Units that are not dense give the mean of each `step` visual tokens; all other slots stay.

    Args:
        dense: of each slot; those of a unit are alike.
    """
    leader = torch.arange(units.n, device=units.slot.device)
    number = torch.arange(len(units.slot), device=leader.device)
    pooled = number - units.place % step
    leader[units.slot] = torch.where(dense[units.slot], units.slot, units.slot[pooled])
    stays = leader == torch.arange(units.n, device=leader.device)
    target = (stays.cumsum(0) - 1)[leader]
    size = torch.zeros(int(stays.sum()), device=leader.device).index_add_(0, target, torch.ones_like(target).float())
    return Levels(target, 1 / size[target], stays.nonzero()[:, 0])


def dense_units(units: Units, wanted: Collection[int], chunk: int) -> Bool[Tensor, " u"]:
    """The units of the first chunk, of the last one, and of those that hold a unit that is wanted."""
    at = torch.div(torch.arange(units.number, device=units.slot.device), chunk, rounding_mode="floor")
    chosen = {0, (units.number - 1) // chunk, *(unit // chunk for unit in wanted)}
    return torch.isin(at, torch.tensor(sorted(chosen), device=at.device))
