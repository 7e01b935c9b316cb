"""Packing: where the tokens of each sample lie. Logical positions outside, physical slots inside."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """The physical slots of one chunk of a batch (a prefill, or the new tokens of a later turn).

    Rows are left-padded to the longest sample. Sizes are known on the host; indices live on the device.

    Attributes:
        source: `[B, P]` the logical position that each slot holds (any value where it pads).
        mask: `[B, P]` True for slots that hold a token.
        real: `[B, S]` True for the logical positions that are tokens, not padding.
        sizes: tokens of each sample, known on the host.
        logical: length of the chunk before anything was dropped, its padding included.
        right: padding stands after the tokens, as the caller's did; then nothing is moved in an identity.
    """

    source: Int[Tensor, "b p"]
    mask: Bool[Tensor, "b p"]
    real: Bool[Tensor, "b s"]
    sizes: tuple[int, ...]
    logical: int
    right: bool = False

    @staticmethod
    def of(mask: Bool[Tensor, "b s"], sizes: tuple[int, ...], right: bool = False) -> "Packing":
        """The packing of a chunk as the caller gave it."""
        logical = mask.shape[1]
        source = torch.arange(logical, device=mask.device).expand(mask.shape)
        return Packing(source, mask, mask, sizes, logical, right)

    @property
    def width(self) -> int:
        return self.source.shape[1]

    @property
    def padded(self) -> bool:
        return any(size != self.width for size in self.sizes)

    def select(self, kept: Bool[Tensor, "b p"], sizes: tuple[int, ...]) -> tuple["Packing", Int[Tensor, "b q"]]:
        """Drop slots. Returns the new packing and, for each new slot, the old one that it holds (padding: any).

        `kept` must be False for padding; `sizes` are its row sums, which the caller knows without asking the device.
        """
        if sizes == self.sizes:  # nothing is dropped, so nothing moves: not padding, and no hole in the mask
            slots = torch.arange(self.width, device=kept.device).expand_as(kept)
            return Packing(self.source, self.mask, self.real, sizes, self.logical, self.right), slots
        width = max(sizes)
        key = kept.to(torch.uint8)
        order = torch.argsort(1 - key if self.right else key, dim=1, stable=True)
        slots = order[:, :width] if self.right else order[:, order.shape[1] - width :]
        held = torch.arange(width, device=slots.device)
        count = torch.tensor(sizes, device=slots.device)[:, None]
        mask = held < count if self.right else held >= width - count
        return Packing(self.source.gather(1, slots), mask, self.real, sizes, self.logical, self.right), slots

    def arrivals(self, slots: Int[Tensor, "b q"]) -> Int[Tensor, "b p"]:
        """For each slot of this packing, its slot in the packing that `select` made with `slots` (dropped ones: 0)."""
        new = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
        return torch.zeros_like(self.source).scatter(1, slots, new)

    def last_slots(self) -> Int[Tensor, " b"]:
        """The slot of the last token of each row."""
        slots = torch.arange(self.width, device=self.mask.device)
        return (slots * self.mask).amax(1)

    def to(self, device: torch.device) -> "Packing":
        """The same packing, its indices on a device; itself where they are there."""
        if self.mask.device == device:
            return self
        moved = (self.source.to(device), self.mask.to(device), self.real.to(device))
        return Packing(*moved, self.sizes, self.logical, self.right)

    def row(self, b: int) -> "Packing":
        """The packing of one row."""
        at = slice(b, b + 1)
        return Packing(self.source[at], self.mask[at], self.real[at], self.sizes[at], self.logical, self.right)

    def to_logical(self) -> Int[Tensor, "b s"]:
        """For each logical position of the chunk, the last slot at or before it: how outputs get their length back.

        A dropped position repeats the state of the survivor before it, which is what the model has read by then; a
        padding position has its own state as long as a slot still holds it.
        """
        slots = torch.arange(self.width, device=self.source.device).expand_as(self.source)
        last = torch.zeros(len(self.sizes), self.logical, dtype=torch.int64, device=self.source.device)
        own = self.mask | ~self.real.gather(1, self.source)
        last.scatter_reduce_(1, self.source, slots * own, "amax")
        return last.cummax(1).values
