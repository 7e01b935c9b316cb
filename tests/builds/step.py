"""Step 3.7: tiles of one size and the whole picture of another, both of which the tower folds by convolutions, a marker
around each and between rows of tiles. Windows with more heads than the full layers have, gates on the heads, experts.

Features are a list with one tensor (tokens × hidden) for each picture: its tiles, then the whole. Masks are made inside
the language model, as a dict of 4-D masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Step3p7Config, Step3p7ForConditionalGeneration

from builds.build import Build, Picture, by_name

IMAGE, START, END, TILE, TILE_END, ROW_END = 250, 251, 252, 253, 254, 255
PATCH, FOLD = 4, 4
SIDE, TILE_SIDE = 48, 32  # pixels: 3 × 3 tokens and 2 × 2 tokens
TILES = {"A": (2, 2), "B": (0, 0), "C": (1, 2)}


def _step3p7(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    settings = {
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "num_sliding_attention_heads": 2 * text["num_attention_heads"],
        "mlp_layer_types": ["sparse" if i % 2 else "dense" for i in range(layers)],
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
    }
    config = Step3p7Config(
        text_config=settings | text,
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "mlp_ratio": 2.0,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "max_position_embeddings": (SIDE // PATCH) ** 2,
        },
        image_token_id=IMAGE,
    )
    return Step3p7ForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    rows, columns = TILES[letter]
    tile = [TILE, *[IMAGE] * (TILE_SIDE // PATCH // FOLD) ** 2, TILE_END]
    tiles = [*tile * columns, ROW_END] * rows
    ids = [*tiles[:-1], START, *[IMAGE] * (SIDE // PATCH // FOLD) ** 2, END]
    tensors = {
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator),
        "num_local_patches": torch.tensor([rows * columns]),
    }
    if rows:
        local = torch.randn(rows * columns, 3, TILE_SIDE, TILE_SIDE, generator=generator)
        tensors["pixel_values_local"] = local
    return ids, tensors


BUILDS = (Build("step3p7", "step3p7", _step3p7, _picture, joined=by_name),)
