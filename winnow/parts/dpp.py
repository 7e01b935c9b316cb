"""Greedy maximum a posteriori of a determinantal point process (Chen et al. 2018): the most probable set of tokens.

The next token is always the one that multiplies the determinant of the chosen kernel the most. The factors of a
Cholesky decomposition grow by a row for each choice, so that no determinant is ever computed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.parts.cosine import Rows

# What is left of a token's own length, as a share, below which it is a sum of the chosen ones but for rounding.
DEPENDENT = 1e-5


def greedy_map(
    rows: Rows,
    length: Float[Tensor, "b n"],
    k: int,
    *,
    weight: Float[Tensor, "b n"] | None = None,
    broken: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b k"]:
    """k tokens of each item, in order of choice; `k` must not exceed the number of tokens.

    The kernel is `w_i S_ij w_j`. No host read; ties go to the lowest index; nothing is taken twice. Past the rank of S,
    where every gain is rounding, the heaviest of what is left are taken.

    Args:
        rows: gives the row of S of one token of each item.
        length: the diagonal of S.
        weight: w, not negative; None: 1.
        broken: tokens that are taken only when no others are left.
    """
    b, n = length.shape
    square = torch.ones_like(length) if weight is None else weight.to(length.dtype).square()
    # Each item has factors of its own, so that it is computed as it is alone.
    factors = [length.new_empty(max(k - 1, 0), n) for _ in range(b)]
    least, left = length * DEPENDENT, length.clone()
    # Two orders that never mix: independent tokens by their gain, above 0, and the others by their weight, below.
    spare = -1 / (1 + square * length)
    out = torch.zeros_like(length)
    if broken is not None:
        out.masked_fill_(broken, -2)
    picks = torch.empty(b, k, dtype=torch.int64, device=length.device)
    for step in range(k):
        gain = torch.where(left > least, square * left, spare)
        gain = torch.where(out < 0, out, gain)
        at = gain.argmax(1, keepdim=True)
        picks[:, step : step + 1] = at
        if step + 1 == k:
            break
        out.scatter_(1, at, -torch.inf)
        own = left.gather(1, at)
        row = rows(at) - _explained(factors, at, step)
        row = torch.where(own > least.gather(1, at), row * own.clamp_min(torch.finfo(own.dtype).tiny).rsqrt(), 0)
        for factor, new in zip(factors, row, strict=True):
            factor[step] = new
        left = (left - row.square()).clamp_min(0)
    return picks


def _explained(factors: Sequence[Float[Tensor, "k n"]], at: Int[Tensor, "b 1"], step: int) -> Float[Tensor, "b n"]:
    """What the choices so far say of the rows of these tokens."""
    return torch.stack(
        [own[:step].T.mv(own[:step].index_select(1, i)[:, 0]) for own, i in zip(factors, at, strict=True)]
    )


def greedy_map_naive(kernel: Float[Tensor, "n n"], k: int) -> list[int]:
    """The same for one item by determinants: the reference that `greedy_map` is tested against."""
    chosen: list[int] = []
    while len(chosen) < k:
        rest = [j for j in range(len(kernel)) if j not in chosen]
        sets = [[*chosen, j] for j in rest]
        values = [float(torch.linalg.det(kernel[s][:, s])) for s in sets]
        chosen.append(rest[values.index(max(values))])
    return chosen
