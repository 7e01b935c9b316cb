"""The content tokens of a layout as planes: each frame of each of its grids, as it lies in the picture."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.layout import Layout


@lru_cache(maxsize=128)
def planes(layout: Layout, device: torch.device) -> tuple[Int[Tensor, "t h w"], ...]:
    """For each grid, the content token at each place of each frame; V, the number of content tokens, where none is."""
    place = layout.place[layout.content]
    found = []
    for grid in np.unique(place[:, 0]):
        own = np.flatnonzero(place[:, 0] == grid)
        spots = place[own, 1:] - place[own, 1:].min(0)
        table = np.full(spots.max(0) + 1, len(place))
        table[tuple(spots.T)] = own
        found.append(torch.from_numpy(table).to(device))
    return tuple(found)
