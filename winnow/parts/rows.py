"""The rows of a layout's grids, tile by tile, and what a score sums up to in each."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.layout import Layout


class Rows(NamedTuple):
    """The rows of a layout, tile by tile; in a video, those of each frame.

    Attributes:
        row: `[V]` the row of each content token.
        members: `[R, W]` the content tokens of each row; V where there are no more.
        tile: `[R]` the tile of each row.
        heights: rows of each tile.
        widths: tokens of a row in each tile; None where they differ in a tile.
    """

    row: Int[Tensor, " v"]
    members: Int[Tensor, "r w"]
    tile: Int[Tensor, " r"]
    heights: tuple[int, ...]
    widths: tuple[int, ...] | None


@lru_cache(maxsize=128)
def rows_of(layout: Layout, device: torch.device) -> Rows:
    """The rows of a layout."""
    place = np.column_stack([layout.tiles, layout.place[layout.content, :3]])
    lines, row, lengths = np.unique(place, axis=0, return_inverse=True, return_counts=True)
    row = row.reshape(-1)
    order = np.argsort(row, kind="stable")
    members = np.full((len(lines), lengths.max(initial=0)), len(row))
    members[row[order], _within(lengths)] = order
    tiles = [lengths[lines[:, 0] == t] for t in range(layout.tiles.max(initial=-1) + 1)]
    even = all(own.min() == own.max() for own in tiles)
    return Rows(
        torch.from_numpy(row).to(device),
        torch.from_numpy(members).to(device),
        torch.from_numpy(lines[:, 0].copy()).to(device),
        tuple(len(own) for own in tiles),
        tuple(int(own[0]) for own in tiles) if even else None,
    )


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … in each of some groups that stand one behind the other."""
    return np.concatenate([np.arange(length) for length in lengths])


def row_sums(scores: Float[Tensor, "b n"], ids: Int[Tensor, "b n"], rows: Rows) -> Float[Tensor, "b r"]:
    """The sum of the scores in each row; −inf where no token of the row is left.

    Args:
        scores: comparable ones, so that a row with a broken token comes behind all others that have tokens.
        ids: which content token each one is.
    """
    spread = scores.new_zeros(scores.shape[0], rows.row.shape[0] + 1).scatter_(1, ids, scores)
    there = torch.zeros_like(spread, dtype=torch.bool).scatter_(1, ids, True)
    # +inf and −inf in one row make NaN, which is a broken row as well.
    total = spread[:, rows.members].sum(2).nan_to_num(nan=-torch.inf).clamp_min(torch.finfo(spread.dtype).min)
    return total.masked_fill(~there[:, rows.members].any(2), -torch.inf)


def row_sums_naive(scores: list[float], ids: list[int], layout: Layout) -> dict[tuple[int, ...], float]:
    """The sums of one item by tile, grid, frame and row: the reference that `row_sums` is tested against."""
    found: dict[tuple[int, ...], float] = {}
    for score, token in zip(scores, ids, strict=True):
        line = (int(layout.tiles[token]), *map(int, layout.place[layout.content[token], :3]))
        found[line] = found.get(line, 0.0) + score
    return found
