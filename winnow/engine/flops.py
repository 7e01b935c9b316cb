"""Analytic FLOPs of an LM prefill. A multiply-add is 2 FLOPs; attention counts as the full N² (no causal half)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def lm_flops(config: Any, layer_tokens: Sequence[Sequence[int]], head_tokens: int = 0) -> int:
    """FLOPs of the linear maps and of attention when layer l reads `layer_tokens[l][b]` tokens of sample b.

    Args:
        config: the text configuration (hidden_size, intermediate_size, heads, key-value heads, head_dim).
        head_tokens: rows that go through the LM head.
    """
    d, f = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    hd = getattr(config, "head_dim", None) or d // heads
    total = 0
    for counts in layer_tokens:
        for n in counts:
            projections = 2 * n * d * (heads * hd) * 2 + 2 * n * d * (kv * hd) * 2
            total += projections + 4 * n * n * heads * hd + 6 * n * d * f
    return total + 2 * head_tokens * d * config.vocab_size


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token in one layer."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    hd = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * kv * hd * itemsize
