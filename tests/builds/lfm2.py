"""LFM2-VL: tiles and a thumbnail, each patches of any grid padded to the most, and a language model whose layers are
short convolutions over the sequence or attention.

Features are a list with one tensor (tokens × hidden) for each tile. Masks are made inside the language model: 4-D for
attention, 2-D for convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Lfm2Config, Lfm2VlConfig, Lfm2VlForConditionalGeneration, Siglip2VisionConfig

from builds.build import Build, Picture

IMAGE, START, END, WHOLE, TILE = 250, 251, 252, 253, 240
PATCH, MERGE, MOST = 4, 2, 64  # pixels, patches, patches
# Patches down and across of each tile; a picture of several has the whole one last.
TILES = {"A": [(6, 6), (6, 6), (4, 8)], "B": [(6, 10)], "C": [(4, 8)]}


def _lfm2_vl(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    settings = {
        "layer_types": ["full_attention" if i % 2 else "conv" for i in range(layers)],
        "block_multiple_of": 16,
        "tie_word_embeddings": False,
    }
    config = Lfm2VlConfig(
        text_config=Lfm2Config(**settings | text),
        vision_config=Siglip2VisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            patch_size=PATCH,
            num_patches=MOST,
        ),
        image_token_id=IMAGE,
        projector_hidden_size=64,
        downsample_factor=MERGE,
        tie_word_embeddings=False,
    )
    return Lfm2VlForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    tiles = TILES[letter]
    several = len(tiles) > 1
    ids = [START]
    pixels = torch.zeros(len(tiles), MOST, 3 * PATCH * PATCH)
    mask = torch.zeros(len(tiles), MOST, dtype=torch.int64)
    for number, (down, across) in enumerate(tiles):
        pixels[number, : down * across] = torch.randn(down * across, 3 * PATCH * PATCH, generator=generator)
        mask[number, : down * across] = 1
        if several:
            ids.append(WHOLE if number == len(tiles) - 1 else TILE + number)
        ids += [IMAGE] * (down * across // MERGE**2)
    tensors = {"pixel_values": pixels, "spatial_shapes": torch.tensor(tiles), "pixel_attention_mask": mask}
    return [*ids, END], tensors


BUILDS = (Build("lfm2_vl", "lfm2_vl", _lfm2_vl, _picture),)
