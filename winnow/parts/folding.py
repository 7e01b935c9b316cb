"""Folding: a run of slots becomes one, their mean, with the weight of all of them."""

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.kv import KVView
from winnow.core.reduction import Reduction
from winnow.core.step import KVReduce


def fold(
    view: KVView, first: Int[Tensor, "b g"], count: Int[Tensor, "b g"], one: Int[Tensor, "b g"], counts: list[int]
) -> KVReduce:
    """In each lane, `count` slots from `first` on become one, or go.

    The one is their mean, and its bias the log of their number; a slot with a bias counts for as many as that says.

    Args:
        first, count: on the host, like `one`.
        one: 1 where one slot stays for them; 0 where none does, or where count is 0.
        counts: slots that are left of each lane.
    """
    stands = bool(one.any())
    first, count, one = (x[..., None].to(view.keys.device) for x in (first, count, one))
    at, m = torch.arange(view.n, device=view.keys.device), max(counts)
    # The place of each slot that is left; that of a run is its newest.
    left = (at[:m] + (at[:m] >= first) * (count - one)).clamp_max(view.n - 1)
    ragged = tuple(counts) if len(set(counts)) > 1 else None
    if not stands:
        chosen = Reduction.select(left, view.n, counts=ragged)
        return KVReduce(chosen, chosen)
    inside = (at >= first) & (at < first + count)
    target = at - (at - first).clamp_min(0).minimum((count - one).clamp_min(0))
    target = target.masked_fill(inside & (one == 0), -1)
    bias = torch.zeros(target.shape, device=target.device) if view.bias is None else view.bias.float()
    whole = bias.masked_fill(~inside, -torch.inf).logsumexp(-1, keepdim=True)
    weight = torch.where(inside & (one == 1), (bias - whole).exp(), 1.0)
    chosen = Reduction(
        view.n, m, at.expand_as(target), target, weight, counts=ragged, representative=left, ordered=True
    )
    log_bias = torch.where((at[:m] == first) & (one == 1), whole, bias.gather(2, left))
    return KVReduce(chosen, chosen, log_bias)
