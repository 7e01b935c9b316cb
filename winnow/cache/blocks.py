"""Blocks: slots that are stored in another form, in front of a dense tail.

A codec (quantisation, low rank, directions shared by two layers) makes blocks; the layer reads them when it attends.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from winnow.cache.dense import Dense


class Block(Protocol):
    """n slots of one layer in the form of a codec."""

    length: int

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, n, d]`, as near to what was stored as the form allows."""

    def rows(self, move: Any) -> "Block":
        """Moved samples: `move` takes a tensor whose first axis is the batch."""

    def tensors(self) -> Iterator[Tensor]:
        """All that is held; a tensor that two blocks share is counted once."""


class Coded:
    """Blocks, and behind them a tail that is stored as it is.

    Attributes:
        blocks: in order.
        tail: the later slots.
    """

    bias = None
    grows = True

    def __init__(
        self, blocks: list[Block], tail: Dense, real: Tensor | None = None, slots: Tensor | None = None
    ) -> None:
        self.blocks, self.tail, self.real, self.slots = blocks, tail, real, slots

    @property
    def rows_held(self) -> int:
        """Samples."""
        return self.tail.rows_held

    @property
    def coded(self) -> int:
        """Slots in blocks."""
        return sum(block.length for block in self.blocks)

    @property
    def length(self) -> int:
        return self.coded + self.tail.length

    def read(self) -> tuple[Tensor, Tensor]:
        parts = [*(block.read() for block in self.blocks), self.tail.read()]
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None = None, seen: int = 0) -> None:
        """As `Dense.append`."""
        if self.real is not None or real is not None:
            ones = torch.ones(keys.shape[0], self.length, dtype=torch.bool, device=keys.device)
            new = ones.new_ones(keys.shape[0], keys.shape[2]) if real is None else real
            self.real = torch.cat([ones if self.real is None else self.real, new], 1)
        self.tail.append(keys, values)

    def encode(self, encode: Any, count: int) -> None:
        """Turn the first `count` slots of the tail into a block."""
        keys, values = self.tail.read()
        block = encode(keys[:, :, :count].contiguous(), values[:, :, :count].contiguous())
        self.blocks.append(block)
        rest = keys[:, :, count:].clone(), values[:, :, count:].clone()
        self.tail = Dense(*rest, grows=True)

    def crop(self, count: int) -> None:
        self.tail.crop(count)
        self.real = None if self.real is None else self.real[:, :-count]

    def rows(self, move: Any) -> "Coded":
        real, slots = (None if x is None else move(x) for x in (self.real, self.slots))
        return Coded([block.rows(move) for block in self.blocks], self.tail.rows(move), real, slots)

    def tensors(self) -> Iterator[Tensor]:
        for block in self.blocks:
            yield from block.tensors()
        yield from self.tail.tensors()
        yield from (x for x in (self.real, self.slots) if x is not None)


class Grouped:
    """Blocks of groups of samples that hold unequal numbers of slots; the shorter ones get padding in front.

    Args:
        blocks, groups: of each group its block and the rows of its samples.
        length: of the longest.
    """

    def __init__(self, blocks: list[Block], groups: tuple[tuple[int, ...], ...], length: int) -> None:
        self.blocks, self.groups, self.length = blocks, groups, length

    def read(self) -> tuple[Tensor, Tensor]:
        parts = [block.read() for block in self.blocks]
        rows = sum(map(len, self.groups))
        made = tuple(x.new_zeros(rows, x.shape[1], self.length, x.shape[3]) for x in parts[0])
        for own, part in zip(self.groups, parts, strict=True):
            for whole, x in zip(made, part, strict=True):
                whole[list(own), :, self.length - x.shape[2] :] = x
        return made  # type: ignore[return-value]

    def rows(self, move: Any) -> "Grouped":
        order = move(torch.arange(sum(map(len, self.groups)))[:, None])[:, 0].tolist()
        place = {row: (g, i) for g, own in enumerate(self.groups) for i, row in enumerate(own)}
        blocks, groups = [], []
        for number, block in enumerate(self.blocks):
            new = tuple(at for at, row in enumerate(order) if place[row][0] == number)
            if new:
                lanes = torch.tensor([place[order[at]][1] for at in new])
                blocks.append(block.rows(lambda x, lanes=lanes: x[lanes.to(x.device)]))
                groups.append(new)
        return Grouped(blocks, tuple(groups), self.length)

    def tensors(self) -> Iterator[Tensor]:
        for block in self.blocks:
            yield from block.tensors()
