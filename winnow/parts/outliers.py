"""How many of some scores are outliers: by Local Outlier Factor (Breunig et al. 2000), or by quartiles."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rule = Literal["lof", "iqr"]
FAR = 1.5  # an outlier's neighbours are that much denser (scikit-learn's contamination="auto"); and Tukey's fences


def outliers(
    scores: Float[Tensor, "b n"], k: int, rule: Rule = "lof", among: Bool[Tensor, "b n"] | None = None
) -> Int[Tensor, " b"]:
    """The number of outliers of each item.

    Args:
        k: neighbours, for `lof`.
        rule: `lof` finds them at both ends and between groups; `iqr` counts what lies above the upper fence.
        among: the scores that count; None: all.
    """
    among = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    if rule == "lof":
        return (local_outlier_factor(scores, k, among) > FAR).sum(1)
    known = scores.double().masked_fill(~among, torch.nan)
    low, high = known.nanquantile(torch.tensor([0.25, 0.75], device=scores.device, dtype=torch.float64), dim=1)
    return (known > (high + FAR * (high - low))[:, None]).sum(1)


def local_outlier_factor(scores: Float[Tensor, "b n"], k: int, among: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Of each score: how much denser its k nearest neighbours lie than itself, fp64; 0 where it does not count.

    On a line neighbours lie side by side, so O(n · k) distances are enough. Of two neighbours at one distance the lower
    is nearer. With no more than k scores, all others are neighbours.
    """
    n, device = scores.shape[1], scores.device
    total = among.sum(1)
    order = scores.double().masked_fill(~among, torch.inf).sort(dim=1, stable=True)
    value, place = order.values, torch.arange(n, device=device)
    side = torch.cat([torch.arange(-k, 0, device=device), torch.arange(1, k + 1, device=device)])
    near = place[:, None] + side  # n 2k
    there = (near >= 0) & (near < total[:, None, None])
    near = near.clamp(0, n - 1)
    apart = (value[:, near] - value[:, :, None]).abs().masked_fill(~there, torch.inf)
    closest = apart.sort(dim=2, stable=True)
    count = (total - 1).clamp(0, k)[:, None]
    used = torch.arange(2 * k, device=device) < count[..., None]
    near = near.expand(len(scores), -1, -1).gather(2, closest.indices)
    own = closest.values
    last = own.gather(2, (count - 1).clamp_min(0)[..., None].expand(-1, n, 1))[..., 0]  # the k-th distance
    flat = near.flatten(1)
    reach = torch.maximum(own, last.gather(1, flat).reshape(near.shape))
    density = 1 / (_mean(reach, used, count) + 1e-10)
    factor = _mean(density.gather(1, flat).reshape(near.shape), used, count) / density
    factor = torch.where((place < total[:, None]) & (count > 0), factor, 0)
    return torch.empty_like(factor).scatter_(1, order.indices, factor)


def _mean(
    values: Float[Tensor, "b n j"], used: Bool[Tensor, "b 1 j"], count: Int[Tensor, "b 1"]
) -> Float[Tensor, "b n"]:
    return torch.where(used, values, 0).sum(2) / count.clamp_min(1)


def local_outlier_factor_naive(scores: list[float], k: int) -> list[float]:
    """The same for one item, from the definition: the reference that it is tested against."""
    n, k = len(scores), min(k, len(scores) - 1)
    near = [sorted((j for j in range(n) if j != i), key=lambda j: abs(scores[j] - scores[i]))[:k] for i in range(n)]
    last = [abs(scores[own[-1]] - scores[i]) for i, own in enumerate(near)]
    density = [
        1 / (sum(max(abs(scores[j] - scores[i]), last[j]) for j in own) / k + 1e-10) for i, own in enumerate(near)
    ]
    return [sum(density[j] for j in own) / k / density[i] for i, own in enumerate(near)]
