"""Greedy choice of dissimilar tokens: farthest-first (max–min, k-center) and max-sum."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.parts.cosine import Rows, TableRows

CRITERIA = ("max", "sum")


def greedy(
    rows: Rows, first: Int[Tensor, "b 1"], k: int, *, criterion: str = "max", broken: Bool[Tensor, "b n"] | None = None
) -> Int[Tensor, "b k"]:
    """Start at `first`; then, k − 1 times, take the token that is least similar to those taken. In order of choice.

    `k` must not exceed the number of tokens. One row and a running value for each step; no host read; ties go to the
    lowest index; nothing is taken twice.

    Args:
        rows: gives the similarity of every token to one token of each item.
        first: the first choice of each item.
        criterion: similarity to a set is its maximum over the set (farthest-first: within a factor 2 of the best
            possible smallest distance, Gonzalez 1985) or its sum.
        broken: tokens that are taken only when no others are left.
    """
    if criterion not in CRITERIA:
        raise WinnowError(f"criterion={criterion!r}; allowed: {', '.join(CRITERIA)}.")
    picks = first.new_empty(first.shape[0], k)
    picks[:, :1] = first
    near = rows(first).clone()
    if broken is not None:
        near.masked_fill_(broken, torch.finfo(near.dtype).max)
    near.scatter_(1, first, torch.inf)
    if isinstance(rows, TableRows) and near.device.type == "cpu":
        for lane, values, own in zip(near, rows.alike, picks, strict=True):
            _pick(lane.detach().numpy(), values.detach().numpy(), own.numpy(), criterion)
        return picks
    for step in range(1, k):
        at = near.argmin(1, keepdim=True)
        picks[:, step : step + 1] = at
        if step + 1 < k:
            row = rows(at)
            torch.maximum(near, row, out=near) if criterion == "max" else near.add_(row)
            near.scatter_(1, at, torch.inf)
    return picks


def _pick(near: np.ndarray, alike: np.ndarray, picks: np.ndarray, criterion: str) -> None:
    """All picks behind the first of one item. NumPy's calls are short beside torch's, and there are k · 3 of them."""
    join = np.maximum if criterion == "max" else np.add
    for step in range(1, len(picks)):
        at = near.argmin()
        picks[step] = at
        join(near, alike[at], out=near)
        near[at] = np.inf


def greedy_naive(similarity: Sequence[Sequence[float]], first: int, k: int, criterion: str = "max") -> list[int]:
    """The same for one item, written as in the papers: the reference that `greedy` is tested against."""
    closeness: Callable[[Iterable[float]], float] = max if criterion == "max" else sum
    chosen = [first]
    while len(chosen) < k:
        rest = [j for j in range(len(similarity)) if j not in chosen]
        chosen.append(min(rest, key=lambda j: closeness(similarity[i][j] for i in chosen)))
    return chosen
