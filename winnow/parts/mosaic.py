"""A thumbnail and the mosaic of crops beside it: where a token lies, and which crop shows a part of the thumbnail."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.layout import Layout


class Mosaic(NamedTuple):
    """A thumbnail and its crops: where each content token stands in the grid of the thumbnail or of the mosaic, the
    sides of both, and the crop in whose part each cell of the thumbnail lies."""

    place: Int[Tensor, " v"]
    sides: tuple[tuple[int, int], tuple[int, int]]
    crop: Int[Tensor, " cells"]


@lru_cache(maxsize=128)
def mosaic_of(layout: Layout, device: torch.device) -> Mosaic | None:
    """None where there are no crops that make one mosaic beside a thumbnail."""
    tile, (grid, frame, row, col) = layout.tiles, layout.place[layout.content].T
    thumbnail = tile == 0
    if frame.any() or len(set(zip(thumbnail.tolist(), grid.tolist(), strict=True))) != 2:
        return None
    (h, w), (rows, cols) = ((int(row[own].max()) + 1, int(col[own].max()) + 1) for own in (thumbnail, ~thumbnail))
    starts = np.array([(row[tile == t].min(), col[tile == t].min()) for t in range(1, tile.max() + 1)])
    (ys, down), (xs, across) = (np.unique(own, return_inverse=True) for own in starts.T)
    number = np.zeros((len(ys), len(xs)), dtype=np.int64)
    number[down, across] = np.arange(len(starts))
    # Rows and columns of the thumbnail fall to crops in equal parts; the last part has what is left over.
    bands = (np.minimum(np.arange(n) // max(n // parts, 1), parts - 1) for n, parts in ((h, len(ys)), (w, len(xs))))
    crop = number[np.ix_(*bands)].reshape(-1)
    place = np.where(thumbnail, row * w + col, row * cols + col)
    return Mosaic(torch.as_tensor(place, device=device), ((h, w), (rows, cols)), torch.as_tensor(crop, device=device))
