"""InternVL: tiles and a thumbnail as one run of tokens, which a pixel shuffle made of 2 × 2 patches; a video is a run
for each frame, under the placeholder and the pixels of pictures. Features are a tensor (tiles, tokens, width)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from builds.build import TEXT, Build, Picture
from builds.towers import tower

IMAGE, START, END = 250, 251, 252
SIDE, PATCH, TOKENS = 24, 4, 9  # a tile of 6 × 6 patches is 3 × 3 tokens
TILES = {"A": 3, "B": 1, "C": 5}  # 2 and a thumbnail, one alone, 4 and a thumbnail
FRAMES = 3


def _internvl(text: dict[str, Any]) -> nn.Module:
    config = InternVLConfig(
        text_config=Qwen2Config(**text),
        vision_config=tower(SIDE, PATCH),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    tiles = FRAMES if letter == "V" else TILES[letter]
    pixels = {"pixel_values": torch.randn(tiles, 3, SIDE, SIDE, generator=generator)}
    if letter == "V":  # each frame has its number before it
        return [i for f in range(FRAMES) for i in (TEXT[0] + f, START, *[IMAGE] * TOKENS, END)], pixels
    return [START, *[IMAGE] * (TOKENS * tiles), END], pixels


BUILDS = (Build("internvl", "internvl", _internvl, _picture, letters="ABCV"),)
