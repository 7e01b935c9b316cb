"""The tiles of items apart, each with its part of the budget: for choices in a tile that are more than a ranking."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.budget import split_evenly
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.tiles import n_tiles, tile_of
from winnow.core.view import View

Choose = Callable[..., Int[Tensor, "r k"]]
"""`choose(k, *tensors)`: k of the tokens whose values `[r, n, …]` it is given, as indices among them."""


def tiles_apart(view: View, keep: int) -> Iterator[tuple[slice, Int[Tensor, " _"], int]]:
    """Some items of the view, the tokens of one of their tiles, and how many of these are to be kept, at least one.

    The budget is split equally over the tiles. All items come at once, without a host read, while they hold all tokens
    of their layout; where an earlier method has removed some, one after the other, which costs one host read.
    """
    device = view.ids.device
    if view.n == view.layout.n_content:
        yield from ((slice(view.b), members, k) for members, k in _of_layout(view.layout, keep, device))
        return
    for item, tiles in enumerate(tile_of(view).cpu().numpy()):
        yield from ((slice(item, item + 1), members, k) for members, k in _split(tiles, keep, device))


def select_per_tile(view: View, keep: int, choose: Choose, *tensors: Tensor) -> Reduction:
    """Keep so many tokens of each item, each tile's chosen without a look at the others.

    Args:
        choose: is called for each tile with the tokens of as many items as `tiles_apart` gives at once.
        tensors: `[b, N, …]` what it looks at.
    """
    keep = min(keep, view.n)
    if n_tiles(view.layout) == 1:
        return Reduction.select(choose(keep, *tensors).sort(1).values, view.n)
    kept = torch.zeros_like(view.ids, dtype=torch.bool)
    for lanes, members, k in tiles_apart(view, keep):
        kept[lanes].scatter_(1, members[choose(k, *(x[lanes, members] for x in tensors))], True)
    return Reduction.select(kept, counts=(keep,) * view.b)


@lru_cache(maxsize=256)
def _of_layout(layout: Layout, keep: int, device: torch.device) -> list[tuple[Int[Tensor, " _"], int]]:
    return _split(layout.tiles, keep, device)


def _split(tiles: Int[np.ndarray, " n"], keep: int, device: torch.device) -> list[tuple[Int[Tensor, " _"], int]]:
    """The tokens of each tile that keeps any, and how many it keeps."""
    quota = split_evenly(min(keep, len(tiles)), np.bincount(tiles).tolist())
    members = (torch.from_numpy(np.flatnonzero(tiles == t)).to(device) for t in range(len(quota)))
    return [(own, k) for own, k in zip(members, quota, strict=True) if k]
