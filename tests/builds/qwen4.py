"""Qwen4-Exp: Qwen3-VL's pictures under a language model that is new in nearly every part.

- Residual streams lie side by side: hidden states are (batch, length, 2 * hidden) between layers.
- Delta-net layers, and layers that attend only to the blocks of keys that an indexer selects. Blocks are of visible
  keys in order; their rotation is that of the whole sequence, so position embeddings cover past and present, and the
  cache holds the positions.
- The first layer adds embeddings of n-grams, looked up by the ids of the tokens (`ple_input_ids`); in the place of
  padding it sees the end of a text.
- Masks are made inside the language model, and layers get both kinds. Features are one (tokens, hidden) tensor each.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Qwen4ExpConfig, Qwen4ExpForConditionalGeneration

from builds.build import Build
from builds.grids import VISION_IDS, tower
from builds.qwen import DELTA_NET, EXPERTS, FRAMES


def _qwen4_exp(text: dict[str, Any]) -> nn.Module:
    layers = range(text["num_hidden_layers"])
    settings = {
        **DELTA_NET,
        **EXPERTS,
        "layer_types": ["indexed_attention" if i % 2 else "linear_attention" for i in layers],
        "shared_expert_intermediate_size": 32,
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],  # counted from one
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 300,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 8,  # with fewer, many scores are exactly 0, and which of equal ones is selected is chance
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    } | text
    vision = tower(out_hidden_size=settings["hidden_size"], num_position_embeddings=36)
    config = Qwen4ExpConfig(text_config=settings, vision_config=vision, **VISION_IDS)
    return Qwen4ExpForConditionalGeneration(config)


BUILDS = (Build("qwen4_exp", "qwen4_exp", _qwen4_exp, **FRAMES),)
