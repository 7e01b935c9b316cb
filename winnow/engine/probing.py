"""Probing: the queries and keys that an LM layer is about to use, before it runs."""

from __future__ import annotations

import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from winnow.signals.tap import probe


def probe_layer(
    layer: nn.Module,
    hidden: Float[Tensor, "b p d"],
    embeddings: tuple[Tensor, ...],
    cache: Any,
    rows: Tensor | None,
) -> tuple[Float[Tensor, "b h r e"], Float[Tensor, "b g k e"]]:
    """Queries and keys of a layer for these inputs; the keys of its cache come first.

    Args:
        rows: `[B]` the one slot of each row whose query is wanted; only keys are computed for the others. None: all.
    """
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(hidden)  # type: ignore[operator]
    if rows is not None and _plain_projections(attention):
        q, k = _one_query(attention, normed, embeddings, rows)
    else:
        q, k = probe(attention, hidden_states=normed, position_embeddings=embeddings, attention_mask=None)
        if rows is not None:
            q = q.gather(2, rows[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))
    index = attention.layer_idx
    if cache is not None and index < len(cache.layers) and cache.layers[index].get_seq_length():
        k = torch.cat([cache.layers[index].keys, k], 2)
    return q, k


def _plain_projections(attention: nn.Module) -> bool:
    """Whether queries and keys are a linear map and a rotation, and nothing else."""
    return (
        all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim"))
        and not hasattr(attention, "q_norm")
        and hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
    )


def _one_query(attention: Any, normed: Tensor, embeddings: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, Tensor]:
    """What `probe` gives, with one query instead of all and without values: a third of the projections or less."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    b, p, _ = normed.shape
    at = rows[:, None, None]
    one = normed.gather(1, at.expand(-1, 1, normed.shape[-1]))
    cos, sin = (e.expand(b, -1, -1) for e in embeddings)
    cos_one, sin_one = (e.gather(1, at.to(e.device).expand(-1, 1, e.shape[-1])) for e in (cos, sin))
    q = attention.q_proj(one).view(b, 1, -1, attention.head_dim).transpose(1, 2)
    k = attention.k_proj(normed).view(b, p, -1, attention.head_dim).transpose(1, 2)
    # The rotation takes a pair; half of each pair is left empty of heads.
    q, _ = rotate(q, q[:, :0], cos_one, sin_one)
    _, k = rotate(k[:, :0], k, cos, sin)
    return q, k
