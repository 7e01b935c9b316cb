"""How the interpreter obtains signals: providers by kind of signal, in the coordinates of the tokens of now.

Signals that only one sketch needs are subclasses of Signal in its test, and `provides` says there how they are read:
a new signal needs no change of the core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.core.point import Point
from winnow.core.signal import Signal
from winnow.signals.vision import VisionAttention, VisionKeys

from .flow import Cache, Flow, Lane, Trace
from .toy import ToyVLM

PROVIDERS: dict[type[Signal], Callable[[Any, Sight], Tensor]] = {}


def provides(kind: type[Signal]) -> Callable[[Callable], Callable]:
    """Register how a kind of signal is read: `f(signal, sight) -> [n, …]` for one lane."""

    def add(f: Callable[[Any, Sight], Tensor]) -> Callable:
        PROVIDERS[kind] = f
        return f

    return add


@dataclass
class Sight:
    """What a provider may look at: the lane, its flow, and the cache at `kv`."""

    model: ToyVLM
    point: Point
    flow: Flow
    lane: Lane | None = None
    cache: Cache | None = None

    def tower(self, block: int, read: Callable[[Trace], Tensor]) -> Tensor:
        """The same for a vision block: at `blocks` of one tile, at `features` of all, later of the content tokens."""
        if self.point.name == "blocks":
            if block not in self.flow.traces:
                u = self.model.blocks[block].norm1(self.flow.x)
                return read(Trace(u, *self.model.blocks[block].qkv(u, None)))
            return self._now(self.flow, block, read)
        ids, values, start = [], [], 0
        for tile in self.lane.tiles:
            trace = tile.traces[block]
            then, slots = trace.at[id(tile.lanes[0])]
            ids.append(start + then)
            values.append(read(trace)[slots])
            start += tile.lanes[0].layout.n
        return look_up(torch.cat(ids), torch.cat(values), self.tower_rows())

    def tower_rows(self) -> Tensor:
        """The tower's row of each token of the lane."""
        if self.point.name == "features":
            return self.lane.ids
        rows, layout = self.lane.picture.rows, self.lane.layout
        return torch.tensor([rows[int(layout.cell[layout.content[i]])] for i in self.lane.ids])

    def _now(self, flow: Flow, block: int, read: Callable[[Trace], Tensor]) -> Tensor:
        then, slots = flow.traces[block].at[id(self.lane)]
        return look_up(then, read(flow.traces[block])[slots], self.lane.ids)


def look_up(ids: Tensor, values: Tensor, now: Tensor) -> Tensor:
    """Values that were recorded for `ids`, at the ids of now."""
    at = {int(i): place for place, i in enumerate(ids)}
    return values[torch.tensor([at[int(i)] for i in now], dtype=torch.int64)]


@provides(VisionAttention)
def _vision_attention(signal: VisionAttention, sight: Sight) -> Tensor:
    def read(trace: Trace) -> Tensor:
        block = sight.model.blocks[0]
        weights = block.weights(trace.q, trace.k, trace.bias)
        weights = weights.sum(0) if signal.heads == "sum" else weights.mean(0)
        return weights[0] if signal.query == "cls" else weights.mean(0)

    return sight.tower(signal.block(sight.model.info), read)


@provides(VisionKeys)
def _vision_keys(signal: VisionKeys, sight: Sight) -> Tensor:
    return sight.tower(signal.block(sight.model.info), lambda trace: trace.k.mean(0))
