"""Llama 4: tiles of a fixed size with separators between them, layers that see their chunk of the prompt only, full
layers without rotary positions whose queries are scaled by position, experts in every second layer.

Features: `get_image_features` gives what the tower says (tiles × tokens × tower), before the projector; the class
projects it in its forward. There is no base model: the class holds tower, projector and a causal language model.
Masks are made inside the language model, as a dict of 4-D masks.
Batches are padded on the right: a forward without positions counts padding on the left, and the scale of queries grows
with the position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig
from transformers.models.llama4.modeling_llama4 import Llama4CausalLMOutputWithPast

from builds.build import Build, Picture

PATCHES, START, END, WHOLE, COLUMN_END, ROW_END = 250, 251, 252, 253, 254, 255
SIDE, PATCH, TOKENS = 84, 14, 9  # 6 × 6 patches, shuffled to 3 × 3 tokens
TILES = {"A": (1, 2), "B": (1, 1), "C": (2, 1)}  # down and across; a picture of several has a whole one after them


def _llama4(text: dict[str, Any]) -> nn.Module:
    settings = {
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 12,
        "floor_scale": 8192,
    }
    config = Llama4Config(
        text_config=Llama4TextConfig(**settings | text),
        vision_config=Llama4VisionConfig(
            hidden_size=48,
            intermediate_size=192,  # what the pixel shuffle makes of four neighbours
            num_hidden_layers=2,
            num_attention_heads=4,
            vision_output_dim=48,
            projector_input_dim=48,
            projector_output_dim=48,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        image_token_index=PATCHES,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return Llama4ForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    down, across = TILES[letter]
    tile = [PATCHES] * TOKENS
    row = [*[*tile, COLUMN_END] * (across - 1), *tile, ROW_END]
    several = down * across > 1
    ids = [START, *(row * down if several else []), WHOLE, *tile, END]
    tiles = down * across + several
    return ids, {"pixel_values": torch.randn(tiles, 3, SIDE, SIDE, generator=generator)}


# Where the class's output names what its tower said, its forward asks the language model for it, which has no such
# field: every forward raises AttributeError, with pictures or without.
CLASS_IS_BROKEN = "image_outputs" in Llama4CausalLMOutputWithPast.__dataclass_fields__

BUILDS = () if CLASS_IS_BROKEN else (Build("llama4", "llama4", _llama4, _picture, padding="right"),)
