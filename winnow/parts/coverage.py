"""Greedy maximum coverage: the columns of a table that together come closest to the largest entry of every row.

Coverage is submodular: a column gains less the more is chosen, in floats as well, because differences, maxima and sums
in one order are monotone. What it once gained is a bound on what it gains now, so only columns whose bound is the
highest need be looked at again, and the choice is the same.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LOOKED_AT = 8  # columns at first; twice as many each time that none of them is surely the best


def coverage(
    tables: Sequence[Float[Tensor, "n r"]], k: int, *, broken: Bool[Tensor, "b n"] | None = None
) -> Int[Tensor, "b k"]:
    """k columns of each item's table, in order of choice; `k` must not exceed the number of columns.

    Each time the column is taken with the largest `Σ_r max(M[r, j] − best_r, 0)`, where `best_r` is the largest entry
    of row r among the columns taken so far, and 0 at first. Ties go to the lowest index; nothing is taken twice.

    Args:
        tables: for each item M transposed: a row for each column, so that it lies in one piece of memory.
        broken: columns that are taken only when no others are left.
    """
    picks = []
    for i, table in enumerate(tables):
        never = torch.zeros(table.shape[0], dtype=torch.bool, device=table.device) if broken is None else broken[i]
        # On the CPU bounds are cheap to read; elsewhere all columns are, and nothing waits for the device.
        picks.append((_lazy if table.device.type == "cpu" else _whole)(table, k, never))
    return torch.stack(picks)


def _gain(table: Float[Tensor, "c r"], best: Float[Tensor, " r"]) -> Float[Tensor, " c"]:
    return table.sub(best).clamp_min_(0).sum(1)


def _whole(table: Float[Tensor, "n r"], k: int, never: Bool[Tensor, " n"]) -> Int[Tensor, " k"]:
    """By the gain of every column."""
    best, out = table.new_zeros(table.shape[1]), table.new_zeros(table.shape[0]).masked_fill_(never, -1)
    picks = torch.empty(k, dtype=torch.int64, device=table.device)
    for step in range(k):
        at = torch.where(out < 0, out, _gain(table, best)).argmax(0, keepdim=True)
        picks[step : step + 1] = at
        out.scatter_(0, at, -torch.inf)
        best = torch.maximum(best, table.index_select(0, at)[0])
    return picks


def _lazy(table: Float[Tensor, "n r"], k: int, never: Bool[Tensor, " n"]) -> Int[Tensor, " k"]:
    """By the gain of the columns that can be the best."""
    best = table.new_zeros(table.shape[1])
    bound = _gain(table, best).masked_fill_(never, -1)
    picks: list[int] = []
    for _ in range(k):
        stale = bound.clone()
        stale[never] = -torch.inf
        if not picks:
            stale.fill_(-torch.inf)
        count = LOOKED_AT
        while True:
            at = int(bound.argmax())
            # Nothing that has not been looked at can gain as much, or as much at a lower index.
            if stale[at] == -torch.inf:
                break
            columns = stale.topk(min(count, len(stale))).indices
            bound[columns] = torch.where(stale[columns] == -torch.inf, bound[columns], _gain(table[columns], best))
            stale[columns] = -torch.inf
            count *= 2
        picks.append(at)
        bound[at] = -torch.inf
        torch.maximum(best, table[at], out=best)
    return torch.tensor(picks)


def coverage_naive(table: Float[Tensor, "n r"], k: int) -> list[int]:
    """The same for one item, written as in the paper: the reference that `coverage` is tested against."""
    columns, best = table.tolist(), [0.0] * table.shape[1]
    chosen: list[int] = []
    while len(chosen) < k:
        gains = {
            j: sum(max(a - b, 0) for a, b in zip(columns[j], best, strict=True))
            for j in range(len(columns))
            if j not in chosen
        }
        chosen.append(max(gains, key=lambda j: (gains[j], -j)))
        best = [max(a, b) for a, b in zip(columns[chosen[-1]], best, strict=True)]
    return chosen
