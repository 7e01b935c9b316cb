"""DeepSeek-VL and Janus: pictures of one size under a Llama; features are a tensor (pictures, tokens, width).

- deepseek_vl: a SigLIP tower.
- deepseek_vl_hybrid: a SAM tower for a larger copy of the picture besides, side by side in the width.
- janus: a tower with marks around its tokens; what makes pictures (a VQ-VAE and a head) is there and not used for text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    SiglipVisionConfig,
)
from transformers.models.sam.configuration_sam import SamVisionConfig

from builds.build import Build, Picture
from builds.towers import tower

IMAGE, START, END = 250, 251, 252
SIDE, PATCH, TOKENS = 16, 4, 16
LARGE = 64


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**tower(SIDE, PATCH), vision_use_head=False)


def _deepseek_vl(text: dict[str, Any]) -> nn.Module:
    config = DeepseekVLConfig(
        text_config=LlamaConfig(**text), vision_config=_siglip(), image_token_id=IMAGE, tie_word_embeddings=False
    )
    return DeepseekVLForConditionalGeneration(config)


def _deepseek_vl_hybrid(text: dict[str, Any]) -> nn.Module:
    config = DeepseekVLHybridConfig(
        text_config=LlamaConfig(**text),
        vision_config=_siglip(),
        high_res_vision_config=SamVisionConfig(
            hidden_size=48,
            mlp_ratio=2.0,
            output_channels=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=LARGE,
            patch_size=PATCH,
            window_size=5,
            global_attn_indexes=[1],
        ),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return DeepseekVLHybridForConditionalGeneration(config)


def _janus(text: dict[str, Any]) -> nn.Module:
    width = text["hidden_size"]
    vision = {name: value for name, value in tower(SIDE, PATCH).items() if name != "intermediate_size"}
    config = JanusConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision | {"mlp_ratio": 2.0, "projection_dim": width, "num_image_tokens": TOKENS},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 32,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return JanusForConditionalGeneration(config)


def _pixels(side: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, 3, side, side, generator=generator)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    return [IMAGE] * TOKENS, {"pixel_values": _pixels(SIDE, generator)}


def _two_sizes(letter: str, generator: torch.Generator) -> Picture:
    ids, small = _picture(letter, generator)
    return ids, small | {"high_res_pixel_values": _pixels(LARGE, generator)}


def _marked(letter: str, generator: torch.Generator) -> Picture:
    ids, pixels = _picture(letter, generator)
    return [START, *ids, END], pixels


BUILDS = (
    Build("deepseek_vl", "deepseek_vl", _deepseek_vl, _picture),
    Build("deepseek_vl_hybrid", "deepseek_vl_hybrid", _deepseek_vl_hybrid, _two_sizes),
    Build("janus", "janus", _janus, _marked),
)
