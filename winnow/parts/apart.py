"""The tiles of items apart: for methods whose choice in a tile is more than a ranking."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.budget import split_evenly
from winnow.core.layout import Layout
from winnow.core.tiles import n_tiles, quotas, tile_of
from winnow.core.view import View


def tiles_apart(view: View, keep: int) -> Iterator[tuple[slice, Int[Tensor, " n"], int]]:
    """Some items of the view, the tokens of one of their tiles, and how many of these are to be kept, at least one.

    The budget is split equally over the tiles. All items come at once, without a host read, while they hold all tokens
    of their layout; where an earlier method has removed some, one after the other.
    """
    if view.n == view.layout.n_content:
        for members, k in _tiles(view.layout, keep, view.ids.device):
            yield slice(view.b), members, k
        return
    tile, quota = tile_of(view), quotas(view, keep).tolist()
    for item in range(view.b):
        for number, k in enumerate(quota[item]):
            if k:
                yield slice(item, item + 1), (tile[item] == number).nonzero()[:, 0], k


@lru_cache(maxsize=128)
def _tiles(layout: Layout, keep: int, device: torch.device) -> list[tuple[Int[Tensor, " n"], int]]:
    tiles = torch.tensor(layout.tiles)
    members = [(tiles == t).nonzero()[:, 0].to(device) for t in range(n_tiles(layout))]
    quota = split_evenly(min(keep, len(tiles)), [len(own) for own in members])
    return [(own, k) for own, k in zip(members, quota, strict=True) if k]
