"""Analytic FLOPs of an LM prefill. A multiply-add is 2 FLOPs; attention counts as the full N² (no causal half)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

LINEAR = ("linear_attention", "conv", "mamba", "recurrent", "mlp", "moe")


def lm_flops(config: Any, layer_tokens: Sequence[Sequence[int]], head_tokens: int = 0) -> int:
    """FLOPs of the linear maps and of attention when layer l reads `layer_tokens[l][b]` tokens of sample b.

    Args:
        config: the text configuration (hidden_size, intermediate_size, heads, key-value heads, head_dim).
        head_tokens: rows that go through the LM head.
    """
    d, layers = config.hidden_size, len(layer_tokens)
    # Most layers are alike, and configurations are slow to read: each kind is counted once.
    alike = Counter(zip(_layer_shapes(config, layers), _reaches(config, layers), map(tuple, layer_tokens), strict=True))
    total = 0
    for ((f, heads, kv, hd), keys, counts), times in alike.items():
        for n in counts:
            projections = 2 * n * d * (heads * hd) * 2 + 2 * n * d * (kv * hd) * 2
            total += times * (projections + 4 * n * min(n, keys) * heads * hd + 6 * n * d * f)
    return total + 2 * head_tokens * d * config.vocab_size


def cross_flops(config: Any, words: Sequence[int], keys: Sequence[int], cross: Sequence[int]) -> int:
    """The same where some layers read `keys[b]` states of pictures, and are no more tokens of the sequence.

    Args:
        words: of each sample.
        cross: the layers that read pictures.
    """
    total, d = 0, config.hidden_size
    for index, (f, heads, kv, hd) in enumerate(_layer_shapes(config, config.num_hidden_layers)):
        for n, m in zip(words, keys if index in cross else words, strict=True):
            if m:  # without pictures their layers are left out
                total += 4 * n * d * heads * hd + 4 * m * d * kv * hd + 4 * n * m * heads * hd + 6 * n * d * f
    return total


def _layer_shapes(config: Any, layers: int) -> list[tuple[int, int, int, int]]:
    """`_layer_shape` of each of the first layers."""
    each_its_own = getattr(config, "is_heterogeneous", False)  # asked first: such a configuration may have no one width
    if each_its_own or isinstance(getattr(config, "intermediate_size", None), list | tuple):
        return [_layer_shape(config, index) for index in range(layers)]
    return [_layer_shape(config, 0)] * layers


def _layer_shape(config: Any, index: int) -> tuple[int, int, int, int]:
    """Width of the MLP (of all experts that a token goes to), heads, key-value heads and head width of a layer."""
    own = config
    if getattr(config, "is_heterogeneous", False):
        own = config.per_layer_config[index]
    heads = own.num_attention_heads
    kv = getattr(own, "num_key_value_heads", None) or heads
    hd = getattr(own, "head_dim", None) or config.hidden_size // heads
    f = getattr(own, "intermediate_size", None) or 4 * config.hidden_size
    f = f[index] if isinstance(f, list | tuple) else f
    active, expert = getattr(own, "num_experts_per_tok", None), getattr(own, "moe_intermediate_size", None)
    expert = expert[0] if isinstance(expert, list | tuple) else expert  # that of text, where modalities have their own
    return (active * expert if active and expert else f), heads, kv, hd


def _reaches(config: Any, layers: int) -> list[int]:
    """Keys that a query of each layer reads at most: a window, none where a state takes their place."""
    kinds = getattr(config, "layer_types", None) or ("full_attention",) * layers
    reach = {kind: _reach(config, kind) for kind in set(kinds[:layers])}
    return [reach[kind] for kind in kinds[:layers]]


def _reach(config: Any, kind: str) -> int:
    if kind in LINEAR:
        return 0
    if kind == "chunked_attention":
        return config.attention_chunk_size
    return config.sliding_window if "sliding" in kind and config.sliding_window else sys.maxsize


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token in the first layer."""
    _, _, kv, hd = _layer_shape(config, 0)
    return 2 * kv * hd * itemsize
