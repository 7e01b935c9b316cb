"""Ovis 2: a patch is a probability over visual words, and its feature the mean of their embeddings; the marks around
tiles are visual words too, put over the embeddings of five indicator tokens. (tiles, tokens, width)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Ovis2Config, Ovis2ForConditionalGeneration, Qwen2Config

from builds.build import Build, Picture
from builds.towers import tower

IMAGE, START, GRID, COLUMN, ROW, END = 250, 251, 252, 253, 254, 255
SIDE, PATCH, TOKENS = 24, 4, 9  # a tile of 6 × 6 patches is 3 × 3 tokens
TILES = {"A": (1, 2), "B": (1, 1), "C": (2, 2)}


def _ovis2(text: dict[str, Any]) -> nn.Module:
    config = Ovis2Config(
        text_config=Qwen2Config(**text),
        vision_config=tower(SIDE, PATCH, vocab_size=64, hidden_stride=2, num_visual_indicator_tokens=5),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, GRID, COLUMN, ROW, END],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=False,
    )
    return Ovis2ForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    rows, columns = TILES[letter]
    tile = [IMAGE] * TOKENS
    ids = [START, *tile, GRID]
    for row in range(rows if rows * columns > 1 else 0):
        ids += [ROW] if row else []
        for column in range(columns):
            ids += [COLUMN, *tile] if column else tile
    count = 1 + (rows * columns if rows * columns > 1 else 0)
    return [*ids, END], {"pixel_values": torch.randn(count, 3, SIDE, SIDE, generator=generator)}


BUILDS = (Build("ovis2", "ovis2", _ovis2, _picture),)
