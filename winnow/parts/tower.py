"""The tower's side of an item: its tiles with their [CLS], and steps at `features` that choose among all patches."""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.layout import CLS, Layout
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import State, Step
from winnow.core.view import View


class Tower(NamedTuple):
    """The tokens of an item as its tower gives them, as indices of rows.

    Attributes:
        cls: `[1]` for each tile, its [CLS].
        patches: `[p]` for each tile.
        rank: `[n]` the place of each row when [CLS] and patches of the first tile come first, then the patches of the
            others row by row over the whole mosaic, then their [CLS].
    """

    cls: tuple[Int[Tensor, " 1"], ...]
    patches: tuple[Int[Tensor, " p"], ...]
    rank: Int[Tensor, " n"]


def prefix(view: View) -> int:
    """1 where a tile begins with [CLS], else 0."""
    return int(view.layout.kind[0] == CLS)


def tower_of(view: View, method: str) -> Tower:
    """The tower's rows that a view at `features` holds.

    Raises:
        WinnowError: an earlier step has removed some of them, or a tile has no [CLS] before its patches.
    """
    _need_all(view, method)
    return _tower(view.layout, method, view.tokens.device)


def among_all_patches(method: Method) -> Step:
    """A step at `features` at which a one-step method that selects sees all patches of all tiles, without [CLS].

    A share is of these patches. Behind the projector the model loses those that unpadding removes, so that fewer
    tokens are left where a picture does not fill its tiles.
    """

    def run(view: View, state: State) -> Reduction:
        _need_all(view, method.slug)
        content = _content(view.layout, view.tokens.device)
        ids = torch.arange(len(content), device=content.device).expand(view.b, -1)
        patches = replace(view, tokens=view.tokens[:, content], ids=ids, n_visual=len(content))
        return Reduction.select(content[method.reduce(patches).representatives], view.n)

    return Step(Point("features"), run, method.signals())


def _need_all(view: View, method: str) -> None:
    if view.n != view.layout.n:
        raise WinnowError(
            f"{method} needs all {view.layout.n} tokens of the tower and got {view.n}: put it first at features."
        )


@lru_cache(maxsize=64)
def _content(layout: Layout, device: torch.device) -> Int[Tensor, " p"]:
    return torch.as_tensor(layout.content, device=device)


@lru_cache(maxsize=64)
def _tower(layout: Layout, method: str, device: torch.device) -> Tower:
    starts = np.flatnonzero(layout.kind == CLS)
    if len(starts) == 0 or starts[0] != 0:
        raise WinnowError(
            f"{method} needs the [CLS] token of each tile before its patches; the layout is {layout.key}."
        )
    bounds, content = [*starts, layout.n], layout.content
    group = np.where(layout.kind == CLS, 2, 1)
    group[: bounds[1]] = 0
    grid, frame, row, col = layout.place.T
    rank = np.empty(layout.n, dtype=np.int64)
    rank[np.lexsort((col, row, frame, grid, group))] = np.arange(layout.n)

    def on(array: object) -> Tensor:
        return torch.as_tensor(array, device=device)

    patches = tuple(on(content[(content > a) & (content < b)]) for a, b in pairwise(bounds))
    return Tower(tuple(on([int(a)]) for a in starts), patches, on(rank))
