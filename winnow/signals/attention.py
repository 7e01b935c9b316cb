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


def column_mean(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    scaling: float,
    visible: Bool[Tensor, "b 1 n n"] | None = None,
) -> Float[Tensor, "b h n"]:
    """Mean over the queries of the attention that each key receives, for each head, in fp32, in tiles of rows."""
    b, h, n, d = q.shape
    tile = max(1, min(n, n * d // max(1, k.shape[2])))
    total = q.new_zeros(b, h, k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    for start in range(0, n, tile):
        seen = None if visible is None else visible[:, :, start : start + tile]
        total += _scores(q[:, :, start : start + tile], k, scaling, seen).sum(2)
    return total / n


def column_mean_naive(q: Tensor, k: Tensor, scaling: float, visible: Tensor | None = None) -> Tensor:
    """What `column_mean` computes, from the whole matrix: the reference that it is tested against."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float()) * scaling
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    return logits.softmax(-1).mean(2)
