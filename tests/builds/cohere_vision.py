"""Cohere's two: 2 × 2 patches become one token, pictures are tiles, and of four layers three have a sliding window.

- aya_vision: each tile under the text of its number, the whole picture last.
- cohere2_vision: a line break behind each tile.

Features are a tensor (tiles, tokens, width). The logits are scaled by the language model's `logit_scale`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    SiglipVisionConfig,
)

from builds.build import TEXT, Build, Picture
from builds.towers import tower

IMAGE, START, END, BREAK, TILE, WHOLE = 250, 251, 252, 253, 254, 255
SIDE, PATCH, TOKENS = 24, 4, 9  # a tile of 6 × 6 patches is 3 × 3 tokens
TILES = {"A": 3, "B": 1, "C": 5}


def _text(text: dict[str, Any]) -> Cohere2Config:
    return Cohere2Config(**{"sliding_window": 12, "sliding_window_pattern": 4} | text)


def _vision() -> SiglipVisionConfig:
    return SiglipVisionConfig(**tower(SIDE, PATCH), vision_use_head=False)


def _aya_vision(text: dict[str, Any]) -> nn.Module:
    config = AyaVisionConfig(
        text_config=_text(text), vision_config=_vision(), image_token_index=IMAGE, tie_word_embeddings=False
    )
    return AyaVisionForConditionalGeneration(config)


def _cohere2_vision(text: dict[str, Any]) -> nn.Module:
    config = Cohere2VisionConfig(
        text_config=_text(text),
        vision_config=_vision(),
        image_token_id=IMAGE,
        alignment_intermediate_size=96,
        tie_word_embeddings=False,
    )
    return Cohere2VisionForConditionalGeneration(config)


def _pixels(letter: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(TILES[letter], 3, SIDE, SIDE, generator=generator)}


def _aya_picture(letter: str, generator: torch.Generator) -> Picture:
    tiles = [i for n in range(1, TILES[letter]) for i in (TILE, TEXT[0] + n, *[IMAGE] * TOKENS)]
    return [START, *tiles, WHOLE, *[IMAGE] * TOKENS, END], _pixels(letter, generator)


def _cohere2_picture(letter: str, generator: torch.Generator) -> Picture:
    return [START, *[*[IMAGE] * TOKENS, BREAK] * TILES[letter], END], _pixels(letter, generator)


BUILDS = (
    Build("aya_vision", "aya_vision", _aya_vision, _aya_picture),
    Build("cohere2_vision", "cohere2_vision", _cohere2_vision, _cohere2_picture),
)
