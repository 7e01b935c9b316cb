"""MiniCPM-V: a whole picture and its slices, each with markers around it; patches are merged twice, once in the tower.

The language model is that of Qwen 3.5: linear and full layers in turn. Patches of all pictures are packed side by side
in one row of pixels. Features are a list with one tensor (tokens × hidden) for each slice or whole, not for each
picture. Masks are made inside the language model.
minicpmv4_6: plain positions.
minicpmv4_7: positions in three dimensions, made outside the language model from the markers around the slices: a
slice lies where it lies on the canvas of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from builds.build import Build, Inputs, Picture

IMAGE, VIDEO, START, END, SLICE, SLICE_END, NUMBER, NUMBER_END, NEWLINE = 250, 251, 252, 253, 254, 255, 240, 241, 242
PATCH, MERGE = 4, 4  # pixels, patches
# Patches down and across of the whole, rows and columns of slices, and patches down and across of a slice.
SIZES = {
    "A": ((8, 12), (1, 2), (12, 8)),
    "B": ((16, 12), (0, 0), (0, 0)),
    "C": ((8, 8), (2, 2), (8, 8)),
    "V": ((8, 12), (0, 0), (0, 0)),
}
FRAMES = 2


def _language(text: dict[str, Any]) -> PreTrainedConfig:
    layers = text["num_hidden_layers"]
    settings = {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["full_attention" if i % 2 else "linear_attention" for i in range(layers)],
    }
    return Qwen3_5TextConfig(**settings | text)


def _settings(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "text_config": _language(text),
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 16 * PATCH,
            "patch_size": PATCH,
        },
        "insert_layer_id": 1,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }


def _minicpmv4_6(text: dict[str, Any]) -> nn.Module:
    return MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config(**_settings(text)))


def _minicpmv4_7(text: dict[str, Any]) -> nn.Module:
    markers = {
        "image_start_id": START,
        "image_end_id": END,
        "slice_start_id": SLICE,
        "slice_end_id": SLICE_END,
        "newline_id": NEWLINE,
    }
    return MiniCPMV4_7ForConditionalGeneration(MiniCPMV4_7Config(**_settings(text), **markers))


def _tokens(size: tuple[int, int]) -> int:
    return size[0] * size[1] // MERGE**2


def _packed(sizes: list[tuple[int, int]], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (1 × 3 × patch × patches · patch) and sizes in patches (slices × 2)."""
    patches = sum(down * across for down, across in sizes)
    return torch.randn(1, 3, PATCH, patches * PATCH, generator=generator), torch.tensor(sizes)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    whole, (rows, columns), part = SIZES[letter]
    if letter == "V":
        pixels, sizes = _packed([whole] * FRAMES, generator)
        ids = [START, *[VIDEO] * _tokens(whole), END] * FRAMES
        return ids, {"pixel_values_videos": pixels, "target_sizes_videos": sizes}
    pixels, sizes = _packed([whole, *[part] * rows * columns], generator)
    one = [SLICE, *[IMAGE] * _tokens(part), SLICE_END]
    slices = [*one * columns, NEWLINE] * rows
    ids = [NUMBER, 20, NUMBER_END, START, *[IMAGE] * _tokens(whole), END, *slices[:-1]]
    return ids, {"pixel_values": pixels, "target_sizes": sizes}


def _joined(items: Sequence[Inputs]) -> Inputs:
    """Pixels side by side, sizes one below the other."""
    names = dict.fromkeys(name for item in items for name in item)
    return {
        name: torch.cat([item[name] for item in items if name in item], -1 if name.startswith("pixel") else 0)
        for name in names
    }


def _typed(inputs: Inputs) -> Inputs:
    ids = inputs["input_ids"]
    return inputs | {"mm_token_type_ids": (ids == IMAGE) + 2 * (ids == VIDEO)}


BUILDS = (
    Build("minicpmv4_6", "minicpmv4_6", _minicpmv4_6, _picture, "ABCV", _joined),
    Build("minicpmv4_7", "minicpmv4_7", _minicpmv4_7, _picture, "ABCV", _joined, _typed, ("mm_token_type_ids",)),
)
