"""DeepSeek-OCR 2 and Qianfan-OCR: pictures cut into tiles for the reading of pages.

DeepSeek-OCR 2: a SAM encoder (windows, some global layers) and a second encoder, a language model in form, in which
learned queries read the patches; the queries are what the language model gets. The class fixes their number: 144 for a
view of up to 144 patches, so this build's pictures have 145 tokens (a whole view and a separator) or 289 (a local view
before it). The features of the pictures are a list. The language model's first layer is dense, the others are mixtures
of experts with shared ones.

Qianfan-OCR: tiles of equal size through an InternViT tower, their patches merged two by two, in front of Qwen 3; the
features are a tensor of tiles × tokens, so a picture of several tiles is several rows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2TextConfig,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    Qwen3Config,
)

from builds.build import Build, Inputs, Picture, by_name

IMAGE, START, END = 250, 251, 252
VIEW, QUERIES = 128, 144  # pixels of a side and queries of a view
TILE, PATCH, TOKENS = 56, 7, 16  # 8 × 8 patches of a tile, 4 × 4 tokens
_LOCAL = {"A": 0, "B": 1, "C": 0}
_TILES = {"A": 1, "B": 3, "C": 2}


def _deepseek(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    config = DeepseekOcr2Config(
        vision_config={
            "sam_config": {
                "hidden_size": 32,
                "output_channels": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": VIEW,
                "window_size": 3,
                "global_attn_indexes": [1],
                "downsample_channels": [32, 48],
            },
            "encoder_config": {
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        text_config=DeepseekOcr2TextConfig(
            **{"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)} | experts | text,
        ),
        image_token_id=IMAGE,
    )
    return DeepseekOcr2ForConditionalGeneration(config)


def _pages(letter: str, generator: torch.Generator) -> Picture:
    local = _LOCAL[letter]
    inputs = {"pixel_values": torch.randn(1, 3, VIEW, VIEW, generator=generator)}
    inputs["num_local_patches"] = torch.tensor([local])
    if local:
        inputs["pixel_values_local"] = torch.randn(local, 3, VIEW, VIEW, generator=generator)
    return [IMAGE] * (QUERIES * (1 + local) + 1), inputs


def _joined(pictures: Sequence[Inputs]) -> Inputs:
    """The local views of all pictures together, or none at all."""
    always = by_name([{k: v for k, v in p.items() if k != "pixel_values_local"} for p in pictures])
    local = [p["pixel_values_local"] for p in pictures if "pixel_values_local" in p]
    return always | ({"pixel_values_local": torch.cat(local)} if local else {})


def _qianfan(text: dict[str, Any]) -> nn.Module:
    config = QianfanOCRConfig(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        text_config=Qwen3Config(**{"head_dim": 16} | text),
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
    )
    return QianfanOCRForConditionalGeneration(config)


def _tiles(letter: str, generator: torch.Generator) -> Picture:
    tiles = _TILES[letter]
    pixels = torch.randn(tiles, 3, TILE, TILE, generator=generator)
    return [START, *[IMAGE] * (TOKENS * tiles), END], {"pixel_values": pixels}


BUILDS = (
    Build("deepseek_ocr2", "deepseek_ocr2", _deepseek, _pages, joined=_joined),
    Build("qianfan_ocr", "qianfan_ocr", _qianfan, _tiles),
)
