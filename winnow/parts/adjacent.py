"""Joining neighbours of a sequence into runs, whose order and whose places in time stay.

Tokens are numbered by the run that they are in, from 0 and ascending: `[b, N]`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.reduction import Reduction


def apart(x: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """Tokens in at least fp32, and which of them are broken (NaN or infinite; set to 0)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    broken = ~wide.sum(-1).isfinite()
    return wide.masked_fill(broken[..., None], 0), broken


def alike(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b s"]:
    """Cosine of each token and the one behind it, N − 1 of them; 0 beside a token of length 0."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    return (unit[:, :-1] * unit[:, 1:]).sum(-1).clamp(-1, 1)


def disjoint_pairs(score: Float[Tensor, "b s"], count: int) -> Bool[Tensor, "b s"]:
    """Which neighbours become a pair: those of the highest scores one after the other, no token twice.

    Args:
        score: of each token and the one behind it; −inf is never taken.
        count: pairs of each item. There are at least a third of the scores, whatever these are.

    No host read; among equals the earlier pair. One pass over the scores for each pair.
    """
    taken, left = torch.zeros_like(score, dtype=torch.bool), score.clone()
    last = score.shape[1] - 1
    for _ in range(count):
        best = left.argmax(1, keepdim=True)
        taken.scatter_(1, best, taken.gather(1, best) | (left.gather(1, best) > -torch.inf))
        for step in (-1, 0, 1):
            left.scatter_(1, (best + step).clamp(0, last), -torch.inf)
    return taken


def runs_of(joined: Bool[Tensor, "b s"]) -> Int[Tensor, "b n"]:
    """The run of each token, from which tokens are joined with the one behind them."""
    return torch.cat([joined.new_zeros(joined.shape[0], 1), ~joined], 1).long().cumsum(1)


def means_of(x: Float[Tensor, "b n d"], run: Int[Tensor, "b n"], whole: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The mean of each run, at the number of the run; zeros behind the last. Tokens that are not whole do not count."""
    count = whole.to(x.dtype)
    total = torch.zeros_like(x).scatter_add_(1, run[..., None].expand_as(x), x * count[..., None])
    return total / torch.zeros_like(count).scatter_add_(1, run, count).clamp_min(1)[..., None]


def merged_runs(run: Int[Tensor, "b n"], whole: Bool[Tensor, "b n"], counts: Sequence[int]) -> Reduction:
    """Each run as the mean of its tokens, at the place of its middle one.

    Args:
        whole: tokens that count; a run without any has the mean of its broken ones.
        counts: runs of each item. A token for each is a selection of all.
    """
    b, n = run.shape
    m = max(counts)
    if min(counts) == n:
        return Reduction.select(torch.arange(n, device=run.device).expand(b, n), n)
    size, sound = (
        torch.zeros(b, m, device=run.device).scatter_add_(1, run, part)
        for part in (torch.ones_like(whole, dtype=torch.float32), whole.float())
    )
    counted = torch.where(sound.gather(1, run) > 0, whole.float(), 1.0)
    weight = counted / torch.where(sound > 0, sound, size).gather(1, run)
    first = size.cumsum(1) - size
    middle = (first + ((size - 1) / 2).floor()).clamp_max(n - 1).long()
    index = torch.arange(n, device=run.device).expand(b, n)
    ragged = tuple(counts) if len(set(counts)) > 1 else None
    return Reduction(n, m, index, run, weight, counts=ragged, representative=middle)


def disjoint_pairs_naive(score: Sequence[float], count: int) -> list[int]:
    """The same for one item, over lists: what `disjoint_pairs` is tested against."""
    taken: list[int] = []
    for t in sorted(range(len(score)), key=lambda t: -score[t]):
        if len(taken) < count and all(abs(t - other) > 1 for other in taken):
            taken.append(t)
    return sorted(taken)
