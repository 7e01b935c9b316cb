"""Probing: the queries and keys that an LM layer is about to use, before it runs.

A layer is probed by its own path: it is called, and stops where it would attend. For layers that project and rotate as
Llama's do, and only after a comparison on this very layer, some queries are computed instead of all.
"""

import sys
import weakref
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from winnow.cache.layer import HeldLayer
from winnow.core.errors import UnsupportedError
from winnow.engine.cache import held_by
from winnow.engine.versions import CACHE_NAMES
from winnow.signals.tap import probe

_some_agree: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def probe_layer(
    layer: nn.Module,
    attention: Any,
    args: tuple[Any, ...],
    arguments: dict[str, Any],
    cache: Any,
    rows: Int[Tensor, "b r"] | None,
) -> tuple[Float[Tensor, "b h q e"], Float[Tensor, "b g k e"]]:
    """Queries and keys of a layer for these inputs; the keys of its cache come first.

    Args:
        attention: its attention module.
        args, arguments: with which the layer is about to be called, the hidden states `[B, P, D]` first.
        rows: the slots whose queries are wanted; None: all. Of one for each sample, that query alone is returned; of
            more, all queries, and those that are not wanted may be NaN.
    """
    if rows is None:
        q, k = _by_own_path(layer, args, arguments)
    else:
        q, k = _for_some(layer, attention, args, arguments, rows)
        q = q if rows.shape[1] == 1 else _in_place(q, rows, k.shape[2])
    held = held_by(cache, attention.layer_idx)
    if held:
        if isinstance(cache.layers[attention.layer_idx], HeldLayer):
            raise UnsupportedError(
                f"a step before layer {attention.layer_idx} looks at its keys, and its cache was compressed before "
                "these tokens came; start with a new cache."
            )
        keys = cache.layers[attention.layer_idx].keys[:, :, -held:]
        k = torch.cat([keys.to(k.device), k], 2)  # an offloaded cache keeps them on the CPU
    return q, k


def _by_own_path(layer: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The layer is called without a cache and without our hooks, and stops before it attends."""
    bare = {name: value for name, value in arguments.items() if name not in ("attention_mask", "use_cache")}
    bare |= {name: None for name in CACHE_NAMES if name in bare}
    return probe(layer.forward, *args, attention_mask=None, use_cache=False, **bare)


def _for_some(
    layer: nn.Module, attention: Any, args: tuple[Any, ...], arguments: dict[str, Any], rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries `[B, H, r, e]` of these slots, and all keys."""
    agrees, embeddings = _some_agree.get(layer), arguments.get("position_embeddings")
    if agrees:
        return _some_queries(layer, args[0], embeddings, rows)  # type: ignore[arg-type]
    q, k = _by_own_path(layer, args, arguments)
    q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    if agrees is None:
        pair = isinstance(embeddings, tuple) and len(embeddings) == 2
        alike = pair and _llama_like(layer, attention)
        _some_agree[layer] = alike and _close((q, k), _some_queries(layer, args[0], embeddings, rows))  # type: ignore[arg-type]
    return q, k


def _in_place(q: Tensor, rows: Tensor, slots: int) -> Tensor:
    """Queries at their slots, `[B, H, slots, e]`; NaN where there is none, so that nobody takes it for one."""
    whole = q.new_full((*q.shape[:2], slots, q.shape[3]), torch.nan)
    return whole.scatter_(2, rows[:, None, :, None].expand_as(q), q)


def _llama_like(layer: Any, attention: Any) -> bool:
    """Whether the layer has the parts that `_some_queries` uses."""
    return (
        attention is getattr(layer, "self_attn", None)
        and hasattr(layer, "input_layernorm")
        and all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim"))
        and hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb")
    )


def _close(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Equal but for the order of sums: another norm, rotation or projection differs far more."""
    bound = 1e-4 if a[0].dtype in (torch.float32, torch.float64) else 5e-2
    return all(
        x.shape == y.shape and bool((x - y).abs().max() <= bound * x.abs().max()) for x, y in zip(a, b, strict=True)
    )


def _some_queries(layer: Any, hidden: Tensor, embeddings: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some queries instead of all, and no values: a third of the projections or little more."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    b, p, _ = normed.shape
    at = rows[..., None]
    some = normed.gather(1, at.expand(-1, -1, normed.shape[-1]))
    cos, sin = (e.expand(b, -1, -1) for e in embeddings)
    cos_some, sin_some = (e.gather(1, at.to(e.device).expand(-1, -1, e.shape[-1])) for e in (cos, sin))
    q = attention.q_proj(some).view(b, rows.shape[1], -1, attention.head_dim).transpose(1, 2)
    k = attention.k_proj(normed).view(b, p, -1, attention.head_dim).transpose(1, 2)
    try:
        # The rotation takes a pair; half of each pair is left empty of heads.
        q, _ = rotate(q, q[:, :0], cos_some, sin_some)
        _, k = rotate(k[:, :0], k, cos, sin)
    except (RuntimeError, TypeError):  # a rotation of another kind: the comparison fails, and the own path is used
        return q[:, :, :0], k
    return q, k
