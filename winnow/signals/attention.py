"""Attention without its matrix: a few rows, or the sums of its columns in tiles.

Everything is computed in fp32 (fp64 for fp64 models) from the queries and keys that the attention function received,
so that fused attention stays on. Nothing of heads × N × N is allocated: a tile of rows holds no more elements than
the queries themselves.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def _scores(q: Tensor, k: Tensor, scaling: float, visible: Tensor | None) -> Float[Tensor, "b h r n"]:
    """Softmax rows; grouped key heads are not repeated in memory."""
    b, h, r, d = q.shape
    groups = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.reshape(b, groups, h // groups * r, d).to(wide) @ k.to(wide).transpose(-1, -2)
    logits = logits.reshape(b, h, r, -1).mul_(scaling)
    if visible is not None:
        logits.masked_fill_(~visible, float("-inf"))
    return logits.softmax(-1)


def attention_rows(
    q: Float[Tensor, "b h r d"],
    k: Float[Tensor, "b g n d"],
    scaling: float,
    visible: Bool[Tensor, "b 1 r n"] | None = None,
) -> Float[Tensor, "b h r n"]:
    """The attention rows of these queries over all keys, after softmax, in fp32.

    Args:
        q: queries of the wanted rows, after position embedding.
        k: all keys; `g` may divide `h` (grouped-query attention).
        scaling: of the logits.
        visible: which keys a row may see; None: all.
    """
    return _scores(q, k, scaling, visible)


def column_mean(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], scaling: float) -> Float[Tensor, "b h n"]:
    """Mean over the queries of the attention that each key receives, for each head, at least in fp32.

    Rows are taken in tiles, through one buffer, because in a tower this is most of what selection costs.
    """
    b, h, n, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q, keys = q.to(wide), (k.to(wide) * scaling).transpose(-1, -2)
    tile = max(1, min(n, d))  # no more elements than the queries have
    buffer = q.new_empty(b, h, tile, n)
    total, part = q.new_zeros(b, h, n), q.new_empty(b, h, n)
    for rows in q.split(tile, dim=2):
        weights = buffer if rows.shape[2] == tile else q.new_empty(b, h, rows.shape[2], n)
        torch.matmul(rows, keys, out=weights)
        torch.softmax(weights, -1, out=weights)
        total += torch.sum(weights, 2, out=part)
    return total.div_(n)


def column_mean_naive(q: Tensor, k: Tensor, scaling: float) -> Tensor:
    """What `column_mean` computes, from the whole matrix: the reference that it is tested against."""
    logits = torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float()) * scaling
    return logits.softmax(-1).mean(2)
