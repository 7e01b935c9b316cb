"""Merging the lowest tokens cell by cell: each cell of a grid leaves one token for those of its tokens that are low."""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.select import places, ranked
from winnow.core.view import View


@lru_cache(maxsize=128)
def _cells(layout: Layout, side: float, device: torch.device) -> Int[Tensor, " v"]:
    place = layout.place[layout.content].astype(float)
    place[:, 2:] = np.floor(place[:, 2:] / side)
    return torch.from_numpy(np.unique(place, axis=0, return_inverse=True)[1].reshape(-1)).to(device)


def cells_of(view: View, side: float) -> Int[Tensor, "b n"]:
    """The cell of each token, numbered from 0 over all of the layout: a square whose `side` need not be whole."""
    return _cells(view.layout, side, view.ids.device)[view.ids]


def merge_lowest(
    score: Float[Tensor, "b n"],
    cells: Int[Tensor, "b n"],
    fewer: int,
    more: int | None = None,
) -> Reduction:
    """Make one token of those of the lowest that share a cell: their mean, weighed by score, in the highest's place.

    Where the scores of a cell do not sum to more than 0, its highest token stays as it is. Among equals the later token
    is lower.

    Args:
        score: comparable; at −∞, of broken tokens, nothing of a token goes into a mean.
        fewer: tokens that are to go. As many of the lowest are merged as make exactly that; where even all of them
            would leave more, because there are too many cells, the lowest of what is left goes as well.
        more: merge so many more of the lowest than are to go instead, however many then go: one host read.
    """
    b, n = score.shape
    if fewer <= 0:
        return Reduction.select(torch.arange(n, device=score.device).expand(b, n), n)
    order = ranked(score).flip(1)  # lowest first
    rank = places(order)
    if more is None:
        lowest = torch.full_like(rank, n).scatter_reduce(1, cells, rank, "amin").gather(1, cells)
        joins = (rank != lowest).gather(1, order).long()
        is_low = (joins.cumsum(1) - joins < fewer).gather(1, rank)
    else:
        is_low = rank < fewer + more
    top = torch.full_like(rank, -1).scatter_reduce(1, cells, torch.where(is_low, rank, -1), "amax").gather(1, cells)
    stays = ~is_low | (rank == top)
    if more is None:
        counts, m = None, n - fewer
        chosen = torch.where(stays, rank, -1).topk(m).indices.sort(1).values
    else:
        sizes = tuple(stays.sum(1).tolist())
        m, counts = max(sizes), None if len(set(sizes)) == 1 else sizes
        chosen = torch.argsort((~stays).byte(), dim=1, stable=True)[:, :m]
    slot = torch.full_like(rank, -1)
    own = torch.arange(m, device=rank.device).expand(b, m)
    slot.scatter_(1, chosen, own if counts is None else torch.where(stays.gather(1, chosen), own, -1))
    head = order.gather(1, top.clamp_min(0))  # the token that a low token is merged into
    target = torch.where(is_low, slot.gather(1, head), slot)
    worth = torch.where(is_low & score.isfinite(), score, 0.0)
    total = torch.zeros_like(worth).scatter_add(1, cells, worth).gather(1, cells)
    leads = rank == top
    weight = torch.where(is_low, torch.where(total > 0, worth / total, leads.to(worth.dtype)), 1.0)
    index = torch.arange(n, device=rank.device).expand(b, n)
    return Reduction(n, m, index, target, weight, counts=counts, representative=chosen)


def merge_lowest_naive(
    score: list[float], cells: list[int], fewer: int, more: int | None = None
) -> tuple[list[int], list[dict[int, float]]]:
    """For one item, the tokens that stay, and what each is made of: `merge_lowest` in lists."""
    n = len(score)
    order = sorted(range(n), key=lambda i: (score[i], -i))
    low = min(n, fewer + more) if fewer and more is not None else 0
    if more is None:
        gone, open_cells = 0, set()
        while gone < fewer and low < n:
            gone += cells[order[low]] in open_cells
            open_cells.add(cells[order[low]])
            low += 1
    groups: dict[int, list[int]] = {}
    for i in order[:low]:
        groups.setdefault(cells[i], []).append(i)
    made = {i: {i: 1.0} for i in order[low:]}
    for group in groups.values():
        total = sum(score[i] for i in group)
        made[group[-1]] = {i: score[i] / total for i in group} if total > 0 else {group[-1]: 1.0}
    while more is None and len(made) > n - fewer:
        del made[min(made, key=lambda i: (score[i], -i))]
    stay = sorted(made)
    return stay, [made[i] for i in stay]
