"""Predictive coding on a grid: which cells does a causal neighbour explain? After the predictor of JPEG-LS.

A is the cell to the left, B the one above, C the one between them. The prediction is B where C is similar to A and not
to B, or where there is no A; else A.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.layout import Layout
from winnow.parts.grid import neighbours

Similar = Callable[[Tensor, Tensor], Tensor]
"""`[c, v]`, `[c, v]` → `[c]`: whether cells are alike. Nothing is like NaN."""


class Causal(NamedTuple):
    """The neighbours of each cell that a scan has seen before it, and the cells of each diagonal, which do not depend
    on each other. Behind the cells of the layout stands one more, for a neighbour that is none."""

    left: Int[Tensor, " c"]
    up: Int[Tensor, " c"]
    diagonals: tuple[Int[Tensor, " d"], ...]


@lru_cache(maxsize=64)
def causal(layout: Layout, device: torch.device) -> Causal:
    """Of each tile and frame of a layout by itself."""
    none = torch.full((1,), layout.n_content, device=device)
    left, _, up, _ = neighbours(layout, device).T
    diagonal = layout.place[layout.content, 2:].sum(1)
    groups = tuple(torch.from_numpy(np.flatnonzero(diagonal == d)).to(device) for d in np.unique(diagonal))
    return Causal(torch.cat([left, none]), torch.cat([up, none]), groups)


def explained(x: Float[Tensor, "c v"], similar: Similar, grid: Causal, anchored: bool) -> Bool[Tensor, " c"]:
    """Which cells are similar to their predictions.

    Args:
        x: the cells, and one more; cells that are not there are NaN.
        anchored: neighbours are what a decoder has: itself where a cell was not explained, else its prediction. That
            is a scan along the diagonals; where similar means equal it changes nothing.
    """
    there = ~x[:, 0].isnan()
    if not anchored:
        across, down = similar(x, x[grid.left]), similar(x, x[grid.up])
        return torch.where(_from_above(there, grid.left, grid.up, down[grid.left], across[grid.up]), down, across)
    stands, found = x.clone(), torch.zeros_like(there)
    for cells in grid.diagonals:
        left, up = grid.left[cells], grid.up[cells]
        a, b, c = stands[left], stands[up], stands[grid.left[up]]
        guess = torch.where(_from_above(there, left, up, similar(c, a), similar(c, b))[:, None], b, a)
        found[cells] = good = similar(x[cells], guess)
        stands[cells] = torch.where(good[:, None], guess, x[cells])
    return found


def _from_above(there: Tensor, left: Tensor, up: Tensor, like_a: Tensor, like_b: Tensor) -> Bool[Tensor, " c"]:
    return there[up] & (~there[left] | (like_a & ~like_b))


def explained_naive(
    cells: Sequence[Sequence[Any]], similar: Callable[[Any, Any], bool], anchored: bool
) -> list[list[bool]]:
    """The same for a whole grid, cell by cell: the reference that `explained` is tested against."""
    stands = [list(row) for row in cells]
    found = [[False] * len(row) for row in cells]
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            if r == c == 0:
                continue
            a, b = stands[r][c - 1] if c else None, stands[r - 1][c] if r else None
            guess = b if a is None else a
            if r and c and similar(stands[r - 1][c - 1], a) and not similar(stands[r - 1][c - 1], b):
                guess = b
            found[r][c] = similar(cell, guess)
            if anchored and found[r][c]:
                stands[r][c] = guess
    return found
