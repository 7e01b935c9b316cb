"""Gemma 3: pooled tokens of a SigLIP tower, sliding windows, and masks in which a picture's tokens see each other."""

from __future__ import annotations

from typing import Any

import torch
from builds.build import Build, Inputs, Picture
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

IMAGE, START, END = 250, 251, 252
SIDE, PATCH, TOKENS = 56, 7, 16  # 8 × 8 patches, pooled to 4 × 4 tokens


def _gemma3(text: dict[str, Any]) -> nn.Module:
    settings = {"head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16, "layer_types": None} | text
    layers = settings["num_hidden_layers"]
    settings["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**settings),
        vision_config=SiglipVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            vision_use_head=False,
        ),
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return Gemma3ForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    return [START, *[IMAGE] * TOKENS, END], {"pixel_values": pixels}


def _completed(inputs: Inputs) -> Inputs:
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


BUILDS = (
    Build("gemma3", "gemma3", _gemma3, _picture, completed=_completed, per_token=("token_type_ids",)),
)
