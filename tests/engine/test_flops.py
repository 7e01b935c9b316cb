"""FLOPs of layers that are alike are counted once, and are those of each layer counted for itself."""

import sys
from types import SimpleNamespace

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig, Qwen3NextConfig

from winnow.engine.flops import LINEAR, cross_flops, lm_flops

SMALL = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 50}
COUNTS = [[9, 3], [9, 3], [7, 3], [7, 3], [7, 2], [1, 1], [0, 0], [4, 4]]
CONFIGS = {
    "all alike": LlamaConfig(**SMALL, num_hidden_layers=8, intermediate_size=40),
    "windows": Gemma3TextConfig(
        **SMALL, num_hidden_layers=8, intermediate_size=40, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"] * 4,
    ),
    "experts": MixtralConfig(**SMALL, num_hidden_layers=8, intermediate_size=40),
    "states": Qwen3NextConfig(
        **SMALL, num_hidden_layers=8, intermediate_size=40, moe_intermediate_size=10, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"] * 4,
    ),
    "widths of their own": SimpleNamespace(**SMALL, intermediate_size=[40, 30, 20, 10, 40, 30, 20, 10]),
    "widths by layer, in transformers' words": LlamaConfig(
        **SMALL, num_hidden_layers=8, intermediate_size=40,
        per_layer_config={0: {"intermediate_size": 20}, 2: {"intermediate_size": 10}},
    ),
    "layers of their own": SimpleNamespace(
        **SMALL, is_heterogeneous=True,
        per_layer_config=[
            SimpleNamespace(num_attention_heads=4, num_key_value_heads=1 + i % 2, head_dim=6, intermediate_size=10 + i)
            for i in range(8)
        ],
    ),
}  # fmt: skip


def layer(config, index: int, n: int, keys: int) -> int:
    """Linear maps and attention of n tokens that read so many keys."""
    own = config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config
    f = own.intermediate_size
    f = f[index] if isinstance(f, list) else f
    if getattr(own, "num_experts_per_tok", None) and getattr(own, "moe_intermediate_size", None):
        f = own.num_experts_per_tok * own.moe_intermediate_size
    wide, narrow, d = own.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim, config.hidden_size
    return 4 * n * d * wide + 4 * n * d * narrow + 4 * n * keys * wide + 6 * n * d * f


def reach(config, index: int) -> int:
    kinds = getattr(config, "layer_types", None)
    if not kinds or kinds[index] == "full_attention":
        return sys.maxsize
    return 0 if kinds[index] in LINEAR else config.sliding_window


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_each_layer_for_itself(name):
    config = CONFIGS[name]
    by_hand = sum(
        layer(config, index, n, min(n, reach(config, index))) for index, own in enumerate(COUNTS) for n in own
    )
    assert by_hand > 0
    assert lm_flops(config, COUNTS) == by_hand
    assert lm_flops(config, COUNTS, head_tokens=3) == by_hand + 6 * 24 * 50


def test_layers_of_their_own_that_read_pictures():
    config = CONFIGS["layers of their own"]
    config.num_hidden_layers = 8
    assert cross_flops(config, [5], [5], []) == sum(layer(config, index, 5, 5) for index in range(8))
