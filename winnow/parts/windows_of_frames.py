"""A video made smaller by means over windows of frames, rows and columns: a map that never depends on values."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Window = dict[int, float]  # place along one axis → its weight; weights add up to 1 unless something is left out


class Pooled(NamedTuple):
    """What flows from tokens, frame by frame in raster order, to outputs in the same order.

    Attributes:
        source, target, weight: of each edge.
        anchor: the token in the middle of each output's window.
    """

    source: Int[Tensor, " e"]
    target: Int[Tensor, " e"]
    weight: Float[Tensor, " e"]
    anchor: Int[Tensor, " m"]


def adaptive(side: int, parts: int) -> list[Window]:
    """A side in so many windows of nearly equal length, which overlap where they must; at most one for each place."""
    parts = min(parts, side)
    spans = [range(i * side // parts, -(-(i + 1) * side // parts)) for i in range(parts)]
    return [dict.fromkeys(span, 1 / len(span)) for span in spans]


def strided(frames: int, stride: int, least: int, zeros: bool = False) -> list[Window]:
    """Windows of `stride` frames; fewer frames than would leave `least` are made that many, or as many as there are.

    Args:
        zeros: where the last window is not full, zeros fill it; else its last frame is repeated.
    """
    count = -(-frames // stride)
    if count < least:
        return adaptive(frames, least)
    found = []
    for i in range(count):
        span = range(i * stride, min(frames, (i + 1) * stride))
        window = dict.fromkeys(span, 1 / stride)
        window[span[-1]] += 0.0 if zeros else (stride - len(span)) / stride
        found.append(window)
    return found


def kept(side: int) -> list[Window]:
    """Every place by itself."""
    return [{place: 1.0} for place in range(side)]


def pooled(frames: Sequence[Window], rows: Sequence[Window], columns: Sequence[Window], h: int, w: int) -> Pooled:
    """The map of windows along the three axes of frames of h × w tokens."""
    source: list[int] = []
    target: list[int] = []
    weight: list[float] = []
    anchor: list[int] = []
    for t in frames:
        for r in rows:
            for c in columns:
                for a, x in t.items():
                    for b, y in r.items():
                        for d, z in c.items():
                            source.append((a * h + b) * w + d)
                            target.append(len(anchor))
                            weight.append(x * y * z)
                middle = [list(own)[(len(own) - 1) // 2] for own in (t, r, c)]
                anchor.append((middle[0] * h + middle[1]) * w + middle[2])
    return Pooled(torch.tensor(source), torch.tensor(target), torch.tensor(weight), torch.tensor(anchor))


@lru_cache(maxsize=64)
def squares(frames: int, h: int, w: int, side: int, device: torch.device) -> Pooled:
    """Each frame as `side` × `side` tokens, or as many as it has."""
    return Pooled(*(x.to(device) for x in pooled(kept(frames), adaptive(h, side), adaptive(w, side), h, w)))


@lru_cache(maxsize=64)
def in_time(frames: int, places: int, stride: int, least: int, zeros: bool, device: torch.device) -> Pooled:
    """Every place of a frame as a mean over `strided` frames."""
    found = pooled(strided(frames, stride, least, zeros), kept(1), kept(places), 1, places)
    return Pooled(*(x.to(device) for x in found))
