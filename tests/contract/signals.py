"""Signals that only one paper needs, one class each: where it listens, and what it reads. The engine reads them all."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.contract import LMSignal, Signal, Site, VisionSignal


@dataclass(frozen=True)
class TowerFeatures(Signal):
    """What the projector reads, at the item's content tokens: `[b, N, D of the tower]`. A resampler's input (MQT)."""

    def site(self, info):
        return Site("projector", 0, "hidden")

    def read(self, seen):
        return seen.before


@dataclass(frozen=True)
class CellPixels(Signal):
    """The pixels of each token's part of the picture, `[b, N, values]`: what areas of one colour are made of."""

    def site(self, info):
        return Site("pixels")

    def read(self, seen):
        return seen.patches


@dataclass(frozen=True)
class BlockValues(VisionSignal):
    """Values of one vision block with heads joined, `[b, N, D]`: what a cache of frames holds (STC)."""

    def read(self, seen):
        return seen.v.transpose(1, 2).flatten(2)[:, seen.prefix :]


@dataclass(frozen=True)
class BlockMove(VisionSignal):
    """How far a vision block moves each token, `[b, N]`, from its input and its output."""

    def site(self, info):
        return Site("vision", self.block(info), "hidden")

    def read(self, seen):
        return (seen.after - seen.before)[:, seen.prefix :].norm(dim=-1)


@dataclass(frozen=True)
class MLPOutput(LMSignal):
    """The output of the MLP of an LM layer, `[b, N, D]`."""

    def site(self, info):
        return Site("lm", self.layer, "hidden")

    def read(self, seen):
        return seen.mlp[1]
