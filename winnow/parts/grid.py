"""Neighbours on the grid of a layout."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.layout import Layout


@lru_cache(maxsize=128)
def neighbours(layout: Layout, device: torch.device, wrap: bool = False) -> Int[Tensor, "v 4"]:
    """The left, right, upper and lower neighbour of each content token, in the same tile; V where there is none.

    With `wrap` neighbours are taken by flat index in the tile (±1, ± the tile's width), so that ±1 runs over row ends;
    an index before the first token of the tile is the first, one behind the last is the last.
    """
    place, tile = layout.place[layout.content], layout.tiles
    table = np.full((len(place), 4), len(place))
    for t in range(tile.max(initial=-1) + 1):
        mine = np.flatnonzero(tile == t)
        grid, frame, row, col = place[mine].T
        if wrap:
            mine = mine[np.lexsort((col, row, frame, grid))]
            width = col.max() - col.min() + 1
            for side, step in enumerate((-1, 1, -width, width)):
                table[mine, side] = mine[np.clip(np.arange(len(mine)) + step, 0, len(mine) - 1)]
        else:
            known = {spot: j for j, spot in zip(mine, zip(grid, frame, row, col, strict=True), strict=True)}
            for side, (down, right) in enumerate(((0, -1), (0, 1), (-1, 0), (1, 0))):
                spots = zip(grid, frame, row + down, col + right, strict=True)
                table[mine, side] = [known.get(spot, len(place)) for spot in spots]
    return torch.from_numpy(table).to(device)
