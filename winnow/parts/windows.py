"""Square windows on the grid of a layout."""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.reduction import Reduction


class Windows(NamedTuple):
    """The windows of an item.

    Attributes:
        of: `[v]` the window of each content token, numbered from 0 tile by tile.
        tile: `[w]` the tile of each window.
    """

    of: Int[Tensor, " v"]
    tile: Int[Tensor, " w"]


@lru_cache(maxsize=128)
def windows(layout: Layout, side: int, device: torch.device) -> Windows:
    """Windows of `side` × `side` tokens that do not overlap, for each tile and frame; rest rows and columns of a tile
    belong to the last window before them. A tile that is smaller than a window is one."""
    place, tiles = layout.place[layout.content], layout.tiles
    of, tile = np.zeros(len(place), dtype=np.int64), list[int]()
    for t in range(tiles.max(initial=-1) + 1):
        mine = np.flatnonzero(tiles == t)
        corner = place[mine].min(0)
        row, col = (place[mine] - corner)[:, 2:].T
        down, across = (max(1, (int(axis.max()) + 1) // side) for axis in (row, col))
        own = np.minimum(row // side, down - 1) * across + np.minimum(col // side, across - 1)
        own += (place[mine, 1] - corner[1]) * down * across
        numbers, of[mine] = np.unique(own, return_inverse=True)
        of[mine] += len(tile)
        tile += [t] * len(numbers)
    return Windows(torch.from_numpy(of).to(device), torch.tensor(tile, dtype=torch.int64, device=device))


@lru_cache(maxsize=128)
def full_windows(layout: Layout, side: int, device: torch.device) -> Int[Tensor, "w s"]:
    """The rows of the layout in each full window of `side` × `side` content tokens, from the upper left corner of each
    tile and frame on, in raster order. Rest rows and columns are in none."""
    content = layout.content
    spots = {
        (*map(int, p), int(t)): int(j)
        for j, p, t in zip(content, layout.place[content], layout.tile[content], strict=True)
    }
    first: dict[tuple[int, ...], list[int]] = {}
    for grid, frame, row, col, tile in spots:
        low = first.setdefault((grid, frame, tile), [row, col])
        low[0], low[1] = min(low[0], row), min(low[1], col)
    found = []
    for grid, frame, row, col, tile in spots:
        low = first[grid, frame, tile]
        if (row - low[0]) % side or (col - low[1]) % side:
            continue
        own = [spots.get((grid, frame, row + r, col + c, tile)) for r in range(side) for c in range(side)]
        if None not in own:
            found.append(own)
    return torch.tensor(found, dtype=torch.int64, device=device).reshape(-1, side * side)


def means(rows: Int[Tensor, "w s"], chosen: Bool[Tensor, "b w"], n: int) -> Reduction | None:
    """The map of n tokens in which each chosen window becomes its mean, in the place of the token in its middle.

    Windows are given by their rows and share none. One host read, of how many tokens are left; None where all are.
    """
    b, s = chosen.shape[0], rows.shape[1]
    every = torch.arange(n, device=rows.device).expand(b, -1)
    middle = torch.where(chosen[..., None], rows[:, s // 2, None], rows)
    owner = every.scatter(1, rows.flatten().expand(b, -1), middle.flatten(1))
    left = owner == every
    counts = tuple(left.sum(1).tolist())
    if min(counts) == n:
        return None
    size = torch.zeros_like(owner).scatter_add_(1, owner, torch.ones_like(owner)).gather(1, owner)
    order = torch.argsort((~left).to(torch.uint8), dim=1, stable=True)[:, : max(counts)]
    target = (left.cumsum(1) - 1).gather(1, owner)
    found = Reduction.assign(target, 1 / size, m=max(counts), representative=order)
    return replace(found, counts=counts if len(set(counts)) > 1 else None)
