"""Choosing jointly among the tokens of a tile, with the budget of the item split equally over its tiles."""

from collections.abc import Callable
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


def select_per_tile(view: View, k: int, choose: Choose, *tensors: Tensor) -> Reduction:
    """Keep k tokens of each item, split equally over its tiles, each tile's chosen without a look at the others.

    Args:
        choose: is called once for each tile, with the tokens of all items; where an earlier method has removed tokens,
            once for each tile of each item, which costs one host read.
        tensors: `[b, N, …]` what it looks at.
    """
    k = min(k, view.n)
    if n_tiles(view.layout) == 1:
        return Reduction.select(choose(k, *tensors).sort(1).values, view.n)
    if view.n == view.layout.n_content:
        picks = _of_tiles(_members(view.layout, view.ids.device), k, choose, tensors)
        return Reduction.select(picks.sort(1).values, view.n)
    lanes = [
        _of_tiles(_split(np.asarray(own), view.ids.device), k, choose, tuple(x[i : i + 1] for x in tensors))
        for i, own in enumerate(tile_of(view).tolist())
    ]
    return Reduction.select(torch.cat(lanes).sort(1).values, view.n)


@lru_cache(maxsize=256)
def _members(layout: Layout, device: torch.device) -> tuple[Int[Tensor, " _"], ...]:
    return _split(layout.tiles, device)


def _split(tile: Int[np.ndarray, " n"], device: torch.device) -> tuple[Int[Tensor, " _"], ...]:
    """The tokens of each tile."""
    return tuple(torch.from_numpy(np.flatnonzero(tile == t)).to(device) for t in np.unique(tile))


def _of_tiles(
    members: tuple[Int[Tensor, " _"], ...], k: int, choose: Choose, tensors: tuple[Tensor, ...]
) -> Int[Tensor, "r k"]:
    shares = split_evenly(k, [len(own) for own in members])
    picks = [
        own[choose(share, *(x[:, own] for x in tensors))] for own, share in zip(members, shares, strict=True) if share
    ]
    return torch.cat(picks, 1)
