"""Evict, then merge: slots that are left over join the kept slot that they resemble, or the zero class."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from winnow.core.reduction import Reduction
from winnow.core.select import comparable, ranked

_ROWS = 256


def candidates(
    scores: Float[Tensor, "b g n"], kept: Int[Tensor, "b g k"], last: int, mass: float, most: int
) -> tuple[Int[Tensor, "b g e"], Bool[Tensor, "b g e"]]:
    """The slots that matter though they are not kept, from the best score on, and which of them do matter.

    Args:
        last: the newest slots, which have no part in the mass.
        mass: a slot matters if those before it, the kept ones among them, hold less than this share of the score.
        most: of a head.
    """
    weight = positive(scores)
    weight[..., weight.shape[2] - last :] = 0
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, kept, True)
    open_ = comparable(scores.flatten(0, 1)).view_as(taken).masked_fill(taken, -torch.inf)
    order = ranked(open_.flatten(0, 1)).view_as(kept.new_empty(scores.shape))[..., :most]
    own = weight.gather(2, order)
    before = (weight * taken).sum(-1, keepdim=True) + own.cumsum(-1) - own
    return order, (before < mass * weight.sum(-1, keepdim=True)) | (mass >= 1)


def positive(scores: Float[Tensor, "*lanes n"]) -> Float[Tensor, "*lanes n"]:
    """Scores as weights: what is broken or negative counts as 0."""
    return scores.float().nan_to_num(0, posinf=0, neginf=0).clamp_min(0)


def nearest_class(
    keys: Float[Tensor, "b g n d"], merged: Int[Tensor, "b g e"], centres: Int[Tensor, "b g c"], zero: float
) -> Int[Tensor, "b g e"]:
    """The number of the most similar centre of each slot by the cosine of keys; −1 for the zero class.

    Args:
        zero: similarity of the zero class to everything. A centre that is as similar is nearer.
    """
    if not centres.shape[2] or not merged.shape[2]:
        return torch.full_like(merged, -1)
    found = []
    for own, at, middle in zip(keys, merged, centres, strict=True):  # a batched product gives other bits
        to = _unit(own, middle).transpose(1, 2)
        for part in at.split(_ROWS, 1):
            best = (_unit(own, part) @ to).nan_to_num(-torch.inf).max(2)
            found.append(best.indices.masked_fill(best.values < zero, -1))
    each = len(found) // len(keys)
    return torch.stack([torch.cat(found[i * each : (i + 1) * each], 1) for i in range(len(keys))])


def _unit(keys: Float[Tensor, "g n d"], at: Int[Tensor, "g m"]) -> Float[Tensor, "g m d"]:
    return normalize(keys.gather(1, at[..., None].expand(-1, -1, keys.shape[2])).float(), dim=-1)


def weighted_classes(
    scores: Float[Tensor, "b g n"],
    kept: Int[Tensor, "b g k"],
    merged: Int[Tensor, "b g e"],
    target: Int[Tensor, "b g e"],
) -> Reduction:
    """Each kept slot as the mean of itself and the members of its class, weighted by their scores."""
    n, k = scores.shape[2], kept.shape[2]
    index = torch.cat([kept, merged], 2)
    to = torch.cat([torch.arange(k, device=kept.device).expand_as(kept), target], 2)
    own = positive(scores).gather(2, index).masked_fill(to < 0, 0)
    total = own.new_zeros(kept.shape).scatter_add_(2, to.clamp_min(0), own).gather(2, to.clamp_min(0))
    itself = torch.arange(index.shape[2], device=index.device) < k
    weight = torch.where(total > 0, own / total, itself.float())
    return Reduction.edges(index, to, weight, n=n, m=k, representative=kept)
