"""GOT-OCR 2 and PP-Chart2Table, one class under two configurations: SAM's tower with windows and relative positions,
and convolutions that make 4 × 4 patches one token. Features are a tensor (tiles, tokens, width).

GOT-OCR 2 takes tiles and pages as one run of tokens; PP-Chart2Table takes pictures of one size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GotOcr2Config, GotOcr2ForConditionalGeneration, PPChart2TableConfig, Qwen2Config

from builds.build import Build, Picture

IMAGE, START, END = 250, 251, 252
SIDE, PATCH, TOKENS = 64, 4, 16  # 16 × 16 patches, 4 × 4 tokens
TILES = {"A": 2, "B": 1, "C": 3}


def _settings(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "text_config": Qwen2Config(**text),
        "vision_config": {
            "hidden_size": 48,
            "mlp_dim": 96,
            "output_channels": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "window_size": 5,
            "global_attn_indexes": [1],
        },
        "image_token_index": IMAGE,
        "image_seq_length": TOKENS,
        "tie_word_embeddings": False,
    }


def _got_ocr2(text: dict[str, Any]) -> nn.Module:
    return GotOcr2ForConditionalGeneration(GotOcr2Config(**_settings(text)))


def _pp_chart2table(text: dict[str, Any]) -> nn.Module:
    return GotOcr2ForConditionalGeneration(PPChart2TableConfig(**_settings(text)))


def _tiles(count: int, generator: torch.Generator) -> Picture:
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return [START, *[IMAGE] * (TOKENS * count), END], {"pixel_values": pixels}


BUILDS = (
    Build("got_ocr2", "got_ocr2", _got_ocr2, lambda letter, generator: _tiles(TILES[letter], generator)),
    Build("pp_chart2table", "pp_chart2table", _pp_chart2table, lambda letter, generator: _tiles(1, generator)),
)
