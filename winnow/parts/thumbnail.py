"""A thumbnail of a video: some frames side by side in one picture (TS-LLaVA)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from winnow.core.errors import WinnowError
from winnow.parts.evenly import evenly


def grid_of(count: int) -> tuple[int, int]:
    """Rows and columns for so many frames: the two factors that differ least, no fewer rows than columns."""
    columns = max(i for i in range(1, math.isqrt(count) + 1) if count % i == 0)
    return count // columns, columns


def thumbnail_of(frames: Float[Tensor, "t c h w"], count: int = 6) -> Float[Tensor, "c h w"]:
    """Frames at equal distances, row by row in a picture of the size of one.

    Each is made smaller by the mean over the area of a pixel. Rows and columns of pixels that the grid does not fill
    repeat the last ones.

    Raises:
        WinnowError: there are fewer frames, or frames are smaller than the grid.
    """
    t, _, h, w = frames.shape
    if not 1 <= count <= t:
        raise WinnowError(f"a thumbnail of {count} frames needs as many, and the video has {t}; allowed: 1 to {t}.")
    rows, columns = grid_of(count)
    high, wide = h // rows, w // columns
    if not high or not wide:
        raise WinnowError(f"frames of {h} × {w} pixels are smaller than a grid of {rows} × {columns}; take fewer.")
    small = interpolate(frames[evenly(t, count, frames.device)], (high, wide), mode="area")
    sheet = small.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    down = torch.arange(h, device=frames.device).clamp_max(rows * high - 1)
    across = torch.arange(w, device=frames.device).clamp_max(columns * wide - 1)
    return sheet[:, down][:, :, across]


def thumbnail_naive(frames: Tensor, count: int) -> list[list[list[float]]]:
    """The same pixel by pixel: `[c][h][w]`."""
    t, c, h, w = frames.shape
    rows, columns = min(
        ((a, count // a) for a in range(1, count + 1) if count % a == 0), key=lambda p: abs(p[0] - p[1])
    )
    rows, columns = max(rows, columns), min(rows, columns)
    high, wide = h // rows, w // columns
    shown = [frames[round(i * (t - 1) / max(1, count - 1))] for i in range(count)]

    def pixel(channel: int, y: int, x: int) -> float:
        y, x = min(y, rows * high - 1), min(x, columns * wide - 1)
        own, r, s = shown[y // high * columns + x // wide][channel], y % high, x % wide
        area = own[r * h // high : -(-(r + 1) * h // high), s * w // wide : -(-(s + 1) * w // wide)]
        return float(area.mean())

    return [[[pixel(channel, y, x) for x in range(w)] for y in range(h)] for channel in range(c)]
