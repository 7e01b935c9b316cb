"""A block whose salient tokens go through it, while one token stands for all others (ToC3D): the grid stays whole.

Slow path: the kept tokens and the representative go through attention and MLP. Fast path: every other token gets the
updates that the representative got. Nothing is removed for good, so that what reads a grid can stay as it is.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.select import ranked

Attention = Callable[[Float[Tensor, "b m d"], Int[Tensor, "b m"]], Float[Tensor, "b m d"]]
Update = Callable[[Float[Tensor, "b m d"]], Float[Tensor, "b m d"]]


def slow_fast(
    x: Float[Tensor, "b n d"],
    score: Float[Tensor, "b n"],
    keep: int,
    attention: Attention,
    mlp: Update,
    *,
    legacy: bool = False,
) -> Float[Tensor, "b n d"]:
    """What a block makes of `n` tokens of which `keep` pass through it.

    Args:
        score: logarithms of how salient tokens are; ties go to the first.
        attention: the update of the block's first half, from rows and their places (for rotations). The places of kept
            tokens are their own, that of the representative is `keep`.
        mlp: the update of its second half.
        legacy: weights of the representative as in the released code, the logarithms over their sum, so that the least
            salient token weighs most.
    """
    if keep >= x.shape[1]:
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        x = x + attention(x, places)
        return x + mlp(x)
    order = ranked(score)
    kept, rest = order[:, :keep].sort(1).values, order[:, keep:].sort(1).values
    slow, fast = rows(x, kept), rows(x, rest)
    one = (shares(score.gather(1, rest), legacy)[..., None] * fast).sum(1, keepdim=True).to(x.dtype)
    places = torch.cat([kept, torch.full_like(kept[:, :1], keep)], 1)
    slow = torch.cat([slow, one], 1)
    first = attention(slow, places)
    slow = slow + first
    second = mlp(slow)
    slow = slow + second
    fast = fast + first[:, -1:] + second[:, -1:]
    return torch.empty_like(x).scatter(1, wide(kept, x), slow[:, :-1]).scatter(1, wide(rest, x), fast)


def shares(score: Float[Tensor, "b m"], legacy: bool = False) -> Float[Tensor, "b m"]:
    """What each token weighs in the representative."""
    score = score.float()
    return score / score.sum(1, keepdim=True) if legacy else score.softmax(1)


def wide(index: Int[Tensor, "b m"], x: Float[Tensor, "b n d"]) -> Int[Tensor, "b m d"]:
    return index[..., None].expand(-1, -1, x.shape[-1])


def rows(x: Float[Tensor, "b n d"], index: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    return x.gather(1, wide(index, x))


def slow_fast_naive(
    x: Tensor, score: Tensor, keep: int, attention: Attention, mlp: Update, *, legacy: bool = False
) -> Tensor:
    """The same token by token."""
    out = x.clone()
    for b in range(x.shape[0]):
        order = sorted(range(x.shape[1]), key=lambda j: -float(score[b, j]))
        kept, rest = sorted(order[:keep]), sorted(order[keep:])
        given = [x[b, j] for j in kept]
        if rest:
            weights = [float(score[b, j]) if legacy else float(score[b, j].exp()) for j in rest]
            given.append(sum((w / sum(weights) * x[b, j] for w, j in zip(weights, rest, strict=True)), 0 * x[b, 0]))
        inner = torch.stack(given)[None]
        places = torch.tensor([[*kept, *([keep] if rest else [])]])
        first = attention(inner, places)
        second = mlp(inner + first)
        for row, j in enumerate(kept):
            out[b, j] = x[b, j] + first[0, row] + second[0, row]
        for j in rest:
            out[b, j] = x[b, j] + first[0, -1] + second[0, -1]
    return out
