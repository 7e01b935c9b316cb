"""Blocks: slots that are stored in another form, in front of a dense tail.

A codec (quantisation, low rank, directions shared by two layers) makes blocks; the layer reads them when it attends.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from winnow.cache.dense import Dense

Move = Callable[[Tensor], Tensor]


class Block(Protocol):
    """n slots of one layer in the form of a codec."""

    length: int

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, n, d]`, as near to what was stored as the form allows."""

    def joined(self, later: Any) -> "Block | None":
        """This block and a later one as one, which is read faster; None where they are not alike."""

    def rows(self, move: Move) -> "Block":
        """Moved samples: `move` takes a tensor whose first axis is the batch."""

    def tensors(self) -> Iterator[Tensor]:
        """All that is held; what two blocks share is of both."""


class Lot:
    """Samples that hold equally many slots: blocks, and behind them a tail that is stored as it is.

    Attributes:
        rows: of the batch.
        blocks: in order.
        tail: the later slots.
        marks: which slots of the tail are no padding (of a later turn).
        slots: `[b, G or 1, P]` int32: how many tokens were read before each of the first P slots; the later ones were
            read last, one after the other. None: so were all.
    """

    def __init__(
        self, rows: tuple[int, ...], blocks: list[Block], tail: Dense, marks: list[bool], slots: Tensor | None
    ) -> None:
        self.rows, self.blocks, self.tail, self.marks, self.slots = rows, blocks, tail, marks, slots

    @staticmethod
    def of(rows: tuple[int, ...], keys: Tensor, values: Tensor, slots: Tensor | None) -> "Lot":
        """Samples of which nothing is encoded yet."""
        return Lot(rows, [], Dense(keys, values, grows=True), [True] * keys.shape[2], slots)

    @property
    def coded(self) -> int:
        """Slots in blocks."""
        return sum(block.length for block in self.blocks)

    @property
    def length(self) -> int:
        return self.coded + self.tail.length

    @property
    def waiting(self) -> int:
        """Slots of the tail that are no padding."""
        return sum(self.marks)

    def read(self) -> tuple[Tensor, Tensor]:
        parts = [*(block.read() for block in self.blocks), self.tail.read()]
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def slots_at(self, seen: int) -> Tensor:
        """`[b, G or 1, n]` int32 how many tokens were read before each slot."""
        known = 0 if self.slots is None else self.slots.shape[2]
        device = self.tail.keys.device
        later = torch.arange(seen - (self.length - known), seen, device=device, dtype=torch.int32)
        if self.slots is None:
            return later.expand(len(self.rows), 1, -1)
        return torch.cat([self.slots, later.expand(*self.slots.shape[:2], -1)], 2)

    def take(self, count: int, seen: int) -> tuple[Tensor, Tensor]:
        """The first `count` slots of the tail, which no longer holds them."""
        real = [i for i, mark in enumerate(self.marks) if mark][:count]
        end = real[-1] + 1
        keys, values = (x[:, :, :end] for x in self.tail.read())
        if end > count:
            at = torch.tensor(real, device=keys.device)
            keys, values = keys[:, :, at], values[:, :, at]
            coded, slots = self.coded, self.slots_at(seen)
            self.slots = torch.cat([slots[:, :, :coded], slots[:, :, coded + at], slots[:, :, coded + end :]], 2)
        rest_keys, rest_values = (x[:, :, end:].clone() for x in self.tail.read())
        self.tail, self.marks = Dense(rest_keys, rest_values, grows=True), self.marks[end:]
        return keys.contiguous(), values.contiguous()

    def crop(self, count: int) -> None:
        self.tail.crop(count)
        self.marks = self.marks[: len(self.marks) - count]
        if self.slots is not None:
            self.slots = self.slots[:, :, : self.length]

    def moved(self, lanes: list[int], rows: tuple[int, ...]) -> "Lot":
        """Some samples of this lot, as other rows of the batch."""

        def move(x: Tensor) -> Tensor:
            return x[torch.tensor(lanes, device=x.device)]

        slots = None if self.slots is None else move(self.slots)
        return Lot(rows, [block.rows(move) for block in self.blocks], self.tail.rows(move), list(self.marks), slots)

    def each(self, change: Move) -> None:
        """As `Dense.each`."""
        self.blocks = [block.rows(change) for block in self.blocks]
        self.tail.each(change)
        self.slots = None if self.slots is None else change(self.slots)

    def tensors(self) -> Iterator[Tensor]:
        for block in self.blocks:
            yield from block.tensors()
        yield from self.tail.tensors()
        if self.slots is not None:
            yield self.slots


def encode(lots: tuple[Lot, ...], form: Any, count: int, seen: int) -> None:
    """Turn the first `count` slots of the tails into blocks.

    Args:
        lots: of this layer; of the layer before and of this one, where a codec takes both.
    """
    with torch.no_grad():
        made = form(*(x for lot in lots for x in lot.take(count, seen)))
        for lot, block in zip(lots, made if len(lots) > 1 else (made,), strict=True):
            whole = lot.blocks[-1].joined(block) if lot.blocks else None
            lot.blocks[-1:] = [*lot.blocks[-1:], block] if whole is None else [whole]


class Coded:
    """The slots of a layer that is encoded, by samples of one length; the shorter ones get padding in front."""

    bias = None

    def __init__(self, lots: list[Lot]) -> None:
        self.lots = lots

    @property
    def rows_held(self) -> int:
        """Samples."""
        return sum(len(lot.rows) for lot in self.lots)

    @property
    def heads(self) -> int:
        return self.lots[0].tail.heads

    @property
    def length(self) -> int:
        """Of the longest sample."""
        return max(lot.length for lot in self.lots)

    @property
    def uncut(self) -> int:
        """Slots at the end that every sample holds as they are."""
        return min(lot.tail.length for lot in self.lots)

    @property
    def real(self) -> Tensor | None:
        """`[B, L]` False for padding; None if nothing pads."""
        length, device = self.length, self.lots[0].tail.keys.device
        if all(lot.length == length and all(lot.marks) for lot in self.lots):
            return None
        starts = dict.fromkeys(range(self.rows_held), 0)
        for lot in self.lots:
            starts |= dict.fromkeys(lot.rows, length - lot.length)
        real = torch.arange(length, device=device) >= torch.tensor(list(starts.values()), device=device)[:, None]
        for lot in self.lots:
            if not all(lot.marks):
                real[list(lot.rows), length - len(lot.marks) :] = torch.tensor(lot.marks, device=device)
        return real

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, L, d]`."""
        keys, values = zip(*(lot.read() for lot in self.lots), strict=True)
        return self._whole(keys), self._whole(values)

    def slots_at(self, seen: int) -> Tensor:
        """`[B, G, L]` int32 how many tokens were read before each slot."""
        parts = tuple(lot.slots_at(seen).expand(-1, self.heads, -1)[..., None] for lot in self.lots)
        return self._whole(parts)[..., 0]

    def _whole(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The lots as one batch."""
        first = parts[0]
        if len(parts) == 1:
            return first
        length = max(x.shape[2] for x in parts)
        made = first.new_zeros(self.rows_held, first.shape[1], length, first.shape[3])
        for lot, x in zip(self.lots, parts, strict=True):
            made[list(lot.rows), :, length - x.shape[2] :] = x
        return made

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None, seen: int = 0) -> None:
        """As `Dense.append`."""
        if real is not None:
            self._split(real.tolist())
        for lot in self.lots:
            new = (keys, values) if len(self.lots) == 1 else (x[list(lot.rows)] for x in (keys, values))
            lot.tail.append(*new)
            lot.marks += [True] * keys.shape[2] if real is None else real[lot.rows[0]].tolist()

    def _split(self, real: list[list[bool]]) -> None:
        """Samples that are padded in different ways are of different lots from now on."""
        found = []
        for lot in self.lots:
            by: dict[tuple[bool, ...], list[int]] = {}
            for lane, row in enumerate(lot.rows):
                by.setdefault(tuple(real[row]), []).append(lane)
            whole = len(by) == 1
            found += [lot if whole else lot.moved(own, tuple(lot.rows[i] for i in own)) for own in by.values()]
        self.lots = found

    def crop(self, count: int) -> None:
        for lot in self.lots:
            lot.crop(count)

    def rows(self, move: Move) -> "Coded":
        order = move(torch.arange(self.rows_held)[:, None])[:, 0].tolist()
        lots = []
        for lot in self.lots:
            lanes = {row: lane for lane, row in enumerate(lot.rows)}
            new = tuple(at for at, row in enumerate(order) if row in lanes)
            if new:
                lots.append(lot.moved([lanes[order[at]] for at in new], new))
        return Coded(lots)

    def each(self, change: Move) -> None:
        """As `Dense.each`."""
        for lot in self.lots:
            lot.each(change)

    def tensors(self) -> Iterator[Tensor]:
        for lot in self.lots:
            yield from lot.tensors()
