"""Selection with the budget of an item split equally over its tiles (crops and thumbnail), to the exact total."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.budget import split_evenly
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.select import comparable, ranked, top_k
from winnow.core.view import View


@lru_cache(maxsize=256)
def _tiles(layout: Layout, device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    tiles = layout.tiles
    return torch.from_numpy(tiles).to(device), tuple(np.bincount(tiles).tolist())


def n_tiles(layout: Layout) -> int:
    """Tiles of an item; 1 for a plain grid."""
    return len(_tiles(layout, torch.device("cpu"))[1])


def tile_of(view: View) -> Int[Tensor, "b n"]:
    """The tile of each token of the view, numbered from 0 without gaps."""
    return _tiles(view.layout, view.ids.device)[0][view.ids]


def in_thumbnail(view: View) -> Bool[Tensor, "b n"]:
    """Which tokens come from the thumbnail, tile 0: all of them for a single tile and for videos, which have none."""
    content = view.layout.content
    if n_tiles(view.layout) == 1 or view.layout.place[content, 1].max() > 0:
        return torch.ones_like(view.ids, dtype=torch.bool)
    return tile_of(view) == 0


def quotas(view: View, total: int) -> Int[Tensor, "b t"]:
    """How many of `total` tokens each tile keeps: as equal as its size allows, earlier tiles get the rest.

    Sizes are known from the layout; where an earlier method has removed tokens they cost one host read.
    """
    tiles, sizes = _tiles(view.layout, view.ids.device)
    if view.n == view.layout.n_content:
        return _quotas((sizes,), min(total, view.n), view.ids.device).expand(view.b, -1)
    left = torch.zeros(view.b, len(sizes), dtype=torch.int64, device=view.ids.device)
    left.scatter_add_(1, tiles[view.ids], torch.ones_like(view.ids))
    return _quotas(tuple(map(tuple, left.tolist())), min(total, view.n), view.ids.device)


@lru_cache(maxsize=256)
def _quotas(sizes: tuple[tuple[int, ...], ...], total: int, device: torch.device) -> Tensor:
    return torch.tensor([split_evenly(total, lane) for lane in sizes], device=device)


def rank_in_tile(scores: Float[Tensor, "b n"], tile: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The rank of each token among those of its tile: 0 is the best score, ties by index. Takes comparable scores."""
    order = ranked(scores)
    order = order.gather(1, tile.gather(1, order).sort(dim=1, stable=True).indices)  # tile by tile, best first
    grouped = tile.gather(1, order)
    slots = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    first = torch.searchsorted(grouped, grouped)
    return torch.empty_like(order).scatter_(1, order, slots - first)


def top_k_per_tile(scores: Float[Tensor, "b n"], k: int, view: View) -> Reduction:
    """`top_k` with k split equally over the tiles of the item."""
    if n_tiles(view.layout) == 1:
        return top_k(scores, k, view)
    tile = tile_of(view)
    kept = rank_in_tile(comparable(scores, view), tile) < quotas(view, k).gather(1, tile)
    return Reduction.select(kept, counts=(min(k, view.n),) * view.b)
