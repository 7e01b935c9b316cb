"""Granite 4 Vision: tiles with a whole picture before them, unpadded, a learned token at the end of each row.

No feature lies in the embeddings that the language model gets: placeholders are 0 there, and features of several
layers of the tower, or of one layer at four offsets, are added to the hidden states before several layers
(`deepstack_features`, a dict from layer to tensor, and `vision_mask`). The features of a call are a list of pairs of
layer and list with one tensor (tokens × hidden) for each picture. Of two pairs with the same layer the last counts.
Masks are made inside the language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionTextConfig,
    SiglipVisionConfig,
)

from builds.build import Build, Picture
from builds.joining import padded
from builds.towers import tower

IMAGE = 250
SIDE, PATCH = 42, 7  # 6 × 6 patches, of which windows of 2 × 2 become one token
WHOLE = 9
# Height and width in pixels, tiles, and tokens down and across (without the row's end). C is padded by its tiles.
SIZES = {"A": ((42, 84), 2, (3, 6)), "B": ((84, 42), 2, (6, 3)), "C": ((84, 60), 4, (6, 4))}


def _granite4_vision(text: dict[str, Any]) -> nn.Module:
    last = text["num_hidden_layers"] - 1
    config = Granite4VisionConfig(
        text_config=Granite4VisionTextConfig(
            **{"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.25} | text
        ),
        vision_config=SiglipVisionConfig(**tower(SIDE, PATCH, hidden_size=64), vision_use_head=False),
        qformer_config=Blip2QFormerConfig(
            hidden_size=64,
            encoder_hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=1,  # of 64: newer configurations set this themselves
            cross_attention_frequency=1,
            max_position_embeddings=64,
            use_qformer_text_input=False,
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
        image_seq_length=WHOLE,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [2, min(1, last)]],
        spatial_target_layers=[min(layer, last) for layer in (2, 3, 4, 5)],
    )
    return Granite4VisionForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    size, tiles, (down, across) = SIZES[letter]
    pixels = torch.randn(1, 1 + tiles, 3, SIDE, SIDE, generator=generator)
    tokens = WHOLE + down * (across + 1)
    return [IMAGE] * tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


BUILDS = (Build("granite4_vision", "granite4_vision", _granite4_vision, _picture, joined=padded),)
