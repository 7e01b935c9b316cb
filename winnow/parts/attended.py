"""What the tokens look at that a whole picture looks at."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.select import ranked

ROWS = 64  # queries at a time


def global_rows(
    q: Float[Tensor, "t h s d"],
    k: Float[Tensor, "t h s d"],
    scaling: float,
    received: Float[Tensor, "t n"],
    threshold: float,
) -> Float[Tensor, "t s"]:
    """The mean attention row, over heads too, of the tokens that receive more than `threshold` times the mean.

    Where none does, the row of the one that receives most. Attention that is received is not negative, so no more than
    n / threshold tokens can receive so much: that many rows are computed, and no host read is needed.

    Args:
        q, k: of all tokens of a tile; the last n of them are those that `received` is about.
        received: comparable.
    """
    n = received.shape[1]
    most = min(n, math.ceil(n / threshold)) if threshold > 1 else n
    rows = ranked(received)[:, :most]
    above = received.gather(1, rows) > threshold * received.mean(1, keepdim=True)
    none = ~above.any(1, keepdim=True)
    weight = torch.cat([above[:, :1] | none, above[:, 1:]], 1).to(received.dtype)
    keys = k.to(received.dtype).transpose(-1, -2) * scaling
    total = received.new_zeros(k.shape[0], k.shape[2])
    for at, own in zip((rows + q.shape[2] - n).split(ROWS, 1), weight.split(ROWS, 1), strict=True):
        queries = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])).to(received.dtype)
        total += torch.einsum("tr,thrn->tn", own, (queries @ keys).softmax(-1))
    return total / (weight.sum(1, keepdim=True) * q.shape[1])


def global_rows_naive(q: Tensor, k: Tensor, scaling: float, received: Tensor, threshold: float) -> Tensor:
    """What `global_rows` computes, from the whole matrix."""
    weights = (torch.einsum("thqd,thkd->thqk", q.float(), k.float()) * scaling).softmax(-1).mean(1)
    prefix = q.shape[2] - received.shape[1]
    found = []
    for own, row in zip(weights, received, strict=True):
        above = (row > threshold * row.mean()).nonzero()[:, 0]
        found.append(own[(above if len(above) else row.argmax()[None]) + prefix].mean(0))
    return torch.stack(found)


def softmax_in_groups(x: Float[Tensor, "b n"], group: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Softmax over the tokens of each group."""
    most = torch.full_like(x, -torch.inf).scatter_reduce(1, group, x, "amax").gather(1, group)
    weight = (x - most).nan_to_num(nan=-torch.inf).exp()
    total = torch.zeros_like(x).scatter_add(1, group, weight).gather(1, group)
    return weight / total.clamp_min(torch.finfo(x.dtype).tiny)


def grey_entropy(grey: Float[Tensor, "c p"]) -> Float[Tensor, " c"]:
    """Shannon entropy, in bits, of the histogram of values from 0 to 1 in 256 bins; what lies outside is clamped."""
    bins = (grey.nan_to_num().clamp(0, 1) * 255).round().long()
    share = grey.new_zeros(len(bins), 256).scatter_add_(1, bins, torch.ones_like(grey))
    return torch.special.entr(share / bins.shape[1]).sum(1) / math.log(2)
