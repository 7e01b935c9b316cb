"""Probing: the queries and keys that an LM layer is about to use, before it runs.

A layer is probed by its own path: it is called, and stops where it would attend. For layers that project and rotate as
Llama's do, and only after a comparison on this very layer, one query is computed instead of all.
"""

import sys
import weakref
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from winnow.engine.versions import cache_keyword
from winnow.signals.tap import probe

_one_query_agrees: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def probe_layer(
    layer: nn.Module,
    hidden: Float[Tensor, "b p d"],
    arguments: dict[str, Any],
    cache: Any,
    last: Int[Tensor, " b"] | None,
) -> tuple[Float[Tensor, "b h r e"], Float[Tensor, "b g k e"]]:
    """Queries and keys of a layer for these inputs; the keys of its cache come first.

    Args:
        arguments: the keyword arguments with which the layer is about to be called.
        last: the slot of the last token of each row, where only its query is wanted; None: all queries.
    """
    attention: Any = layer.self_attn
    embeddings = arguments["position_embeddings"]
    if last is None:
        q, k = _by_own_path(layer, hidden, arguments)
    else:
        q, k = _for_one_query(layer, hidden, arguments, embeddings, last)
    index = attention.layer_idx
    if cache is not None and index < len(cache.layers) and cache.layers[index].keys is not None:
        k = torch.cat([cache.layers[index].keys, k], 2)
    return q, k


def _by_own_path(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The layer is called without a cache and without our hooks, and stops before it attends."""
    bare = {**arguments, "attention_mask": None, cache_keyword(layer.forward): None, "use_cache": False}
    return probe(layer.forward, hidden, **bare)


def _for_one_query(
    layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], embeddings: tuple[Tensor, Tensor], last: Tensor
) -> tuple[Tensor, Tensor]:
    agrees = _one_query_agrees.get(layer)
    if agrees:
        return _one_query(layer, hidden, embeddings, last)
    q, k = _by_own_path(layer, hidden, arguments)
    q = q.gather(2, last[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))
    if agrees is None:
        _one_query_agrees[layer] = _llama_like(layer) and _close((q, k), _one_query(layer, hidden, embeddings, last))
    return q, k


def _llama_like(layer: Any) -> bool:
    """Whether the layer has the parts that `_one_query` uses."""
    attention = layer.self_attn
    return (
        hasattr(layer, "input_layernorm")
        and all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim"))
        and hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
    )


def _close(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Equal but for the order of sums: another norm, rotation or projection differs far more."""
    bound = 1e-4 if a[0].dtype in (torch.float32, torch.float64) else 5e-2
    return all(
        x.shape == y.shape and bool((x - y).abs().max() <= bound * x.abs().max()) for x, y in zip(a, b, strict=True)
    )


def _one_query(layer: Any, hidden: Tensor, embeddings: tuple[Tensor, Tensor], last: Tensor) -> tuple[Tensor, Tensor]:
    """One query instead of all, and no values: a third of the projections or less."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    b, p, _ = normed.shape
    at = last[:, None, None]
    one = normed.gather(1, at.expand(-1, 1, normed.shape[-1]))
    cos, sin = (e.expand(b, -1, -1) for e in embeddings)
    cos_one, sin_one = (e.gather(1, at.to(e.device).expand(-1, 1, e.shape[-1])) for e in (cos, sin))
    q = attention.q_proj(one).view(b, 1, -1, attention.head_dim).transpose(1, 2)
    k = attention.k_proj(normed).view(b, p, -1, attention.head_dim).transpose(1, 2)
    try:
        # The rotation takes a pair; half of each pair is left empty of heads.
        q, _ = rotate(q, q[:, :0], cos_one, sin_one)
        _, k = rotate(k[:, :0], k, cos, sin)
    except (RuntimeError, TypeError):  # a rotation of another kind: the comparison fails, and the own path is used
        return q[:, :, :0], k
    return q, k
