"""Grids made smaller by bilinear interpolation, as edges from places to places: a map that never depends on values."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


class Edges(NamedTuple):
    """What flows from places to outputs.

    Attributes:
        source, target, weight: of each edge; the weights of an output add up to 1.
        place: the place that each output lies at.
    """

    source: Int[np.ndarray, " e"]
    target: Int[np.ndarray, " e"]
    weight: Float[np.ndarray, " e"]
    place: Int[np.ndarray, " m"]


def smaller(side: int, stride: float) -> int:
    """A side at a stride: halves are rounded up, and one is left at least."""
    return min(side, max(1, int(side / stride + 0.5)))


def bilinear(h: int, w: int, high: int, wide: int) -> Edges:
    """An h × w grid as high × wide, pixel centres aligned as by half a pixel, without smoothing."""
    (rows, down), (columns, across) = _line(h, high), _line(w, wide)
    source = rows[:, None, :, None] * w + columns[None, :, None, :]
    weight = down[:, None, :, None] * across[None, :, None, :]
    target = np.broadcast_to(np.arange(high * wide).reshape(high, wide, 1, 1), weight.shape)
    nearest = [ends[np.arange(len(ends)), share.argmax(1)] for ends, share in ((rows, down), (columns, across))]
    used = weight.reshape(-1) > 0
    place = (nearest[0][:, None] * w + nearest[1]).reshape(-1)
    return Edges(source.reshape(-1)[used], target.reshape(-1)[used], weight.reshape(-1)[used], place)


def _line(n: int, m: int) -> tuple[Int[np.ndarray, "m 2"], Float[np.ndarray, "m 2"]]:
    """The two places between which each of m points lies, and what each weighs."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    low = np.floor(at).astype(np.int64)
    share = at - low
    return np.stack([low, np.minimum(low + 1, n - 1)], 1), np.stack([1 - share, share], 1)


def in_groups(frames: int, h: int, w: int, strides: Sequence[float]) -> Edges:
    """Frames in groups, of which each frame has the stride of its place in the group; places frame by frame."""
    parts, made = [], 0
    for t in range(frames):
        stride = strides[t % len(strides)]
        own = bilinear(h, w, smaller(h, stride), smaller(w, stride))
        parts.append(Edges(own.source + t * h * w, own.target + made, own.weight, own.place + t * h * w))
        made += len(own.place)
    return Edges(*(np.concatenate(own) for own in zip(*parts, strict=True)))


def resampled_naive(grid: Float[Tensor, "h w d"], stride: float) -> Float[Tensor, "n d"]:
    """The same of one frame, by torch."""
    h, w, _ = grid.shape
    size = (smaller(h, stride), smaller(w, stride))
    made = torch.nn.functional.interpolate(grid.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)
    return made[0].permute(1, 2, 0).flatten(0, 1)
