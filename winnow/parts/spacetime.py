"""Blocks of a few frames, rows and columns that cover every token of an item, all of one size.

Where a side is no multiple of a block's, blocks are spread evenly and overlap. Of a picture a block has one frame.
Where an earlier method has removed tokens there is no grid, and blocks are runs of what is left.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.parts.planes import planes


class Blocks(NamedTuple):
    """Blocks of the N tokens of a view.

    Attributes:
        rows: `[w, s]` the tokens of each block, frame by frame; N where a place is empty.
        middle: `[w]` a token of each block, its middle one where that is there; none twice.
        others: the tokens that are no block's middle, ascending.
    """

    rows: Int[Tensor, "w s"]
    middle: Int[Tensor, " w"]
    others: Int[Tensor, " o"]


def starts(length: int, side: int) -> list[int]:
    """Where ⌈length / side⌉ blocks begin: evenly, the first at 0 and the last at the end."""
    count = -(-length // side)
    return np.rint(np.linspace(0, length - min(side, length), count)).astype(int).tolist()


def blocks_of(view: View, frames: int, side: int) -> Blocks:
    """The blocks of a view: grid by grid, in the order of frame, row and column."""
    if view.n == view.layout.n_content:
        return _of_layout(view.layout, frames, side, view.tokens.device)
    return _of_run(view.n, (frames if _several(view.layout) else 1) * side * side, view.tokens.device)


@lru_cache(maxsize=128)
def _of_layout(layout: Layout, frames: int, side: int, device: torch.device) -> Blocks:
    frames = frames if _several(layout) else 1
    found = []
    for plane in planes(layout, torch.device("cpu")):
        for corner in product(*(starts(n, k) for n, k in zip(plane.shape, (frames, side, side), strict=True))):
            (t, h, w), (a, b, c) = corner, (min(k, n) for k, n in zip((frames, side, side), plane.shape, strict=True))
            found.append(plane[t : t + a, h : h + b, w : w + c].flatten().tolist())
    return _blocks([own for own in found if min(own) < layout.n_content], layout.n_content, device)


@lru_cache(maxsize=128)
def _of_run(n: int, size: int, device: torch.device) -> Blocks:
    return _blocks([list(range(at, at + min(size, n))) for at in starts(n, size)], n, device)


def _several(layout: Layout) -> bool:
    """Whether an item has more than one frame."""
    return len(np.unique(layout.place[layout.content, 1])) > 1


def _blocks(found: list[list[int]], n: int, device: torch.device) -> Blocks:
    """Blocks in which n stands for an empty place."""
    longest, middles, taken = max(map(len, found)), list[int](), set[int]()
    for own in found:
        near = sorted(range(len(own)), key=lambda i: abs(i - len(own) // 2))
        middles.append(next(own[i] for i in near if own[i] < n and own[i] not in taken))
        taken.add(middles[-1])
    rows = torch.tensor([own + [n] * (longest - len(own)) for own in found], device=device)
    others = torch.tensor([i for i in range(n) if i not in taken], dtype=torch.int64, device=device)
    return Blocks(rows, torch.tensor(middles, device=device), others)
