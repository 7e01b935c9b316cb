"""Choosing jointly among the tokens of a tile, with the budget of the item split equally over its tiles."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.budget import split_evenly
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
        return Reduction.select(_of_tiles(view.layout.tiles, k, choose, tensors).sort(1).values, view.n)
    picks = [
        _of_tiles(np.asarray(own), k, choose, tuple(x[i : i + 1] for x in tensors))
        for i, own in enumerate(tile_of(view).tolist())
    ]
    return Reduction.select(torch.cat(picks).sort(1).values, view.n)


def _of_tiles(tile: Int[np.ndarray, " n"], k: int, choose: Choose, tensors: tuple[Tensor, ...]) -> Int[Tensor, "r k"]:
    members = [np.flatnonzero(tile == t) for t in np.unique(tile)]
    picks = []
    for own, share in zip(members, split_evenly(k, [len(own) for own in members]), strict=True):
        if share:
            index = torch.from_numpy(own).to(tensors[0].device)
            picks.append(index[choose(share, *(x[:, index] for x in tensors))])
    return torch.cat(picks, 1)
