"""Llama 3.2 Vision: tiles of a picture are keys and values of layers between the language model's own.

In the prompt a picture is one token. A text that no picture stands before skips the layers that read pictures. Tensors
are by row and not by picture, which a `Build` cannot pad, so that there are no batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from builds.build import Build, Inputs, Picture

IMAGE = 250
SIDE, PATCH = 28, 7
MOST, TILES, RATIO = 4, 2, 2  # two tiles of at most four, the second of the shapes that the class knows


def _mllama(text: dict[str, Any]) -> nn.Module:
    layers = text["num_hidden_layers"]
    config = MllamaConfig(
        text_config=MllamaTextConfig(
            **{
                "cross_attention_layers": list(range(1, layers, 2)),
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            }
            | text
        ),
        vision_config=MllamaVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_global_layers=2,
            attention_heads=4,
            vision_output_dim=3 * 48,
            intermediate_layers_indices=[0, 2],
            image_size=SIDE,
            patch_size=PATCH,
            max_num_tiles=MOST,
        ),
        image_token_index=IMAGE,
    )
    return MllamaForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    tiles = torch.zeros(1, MOST, 3, SIDE, SIDE)
    tiles[:, :TILES] = torch.randn(1, TILES, 3, SIDE, SIDE, generator=generator)
    shape = {"aspect_ratio_ids": torch.tensor([RATIO]), "aspect_ratio_mask": torch.tensor([[1] * TILES + [0, 0]])}
    return [IMAGE], {"pixel_values": tiles} | shape


def _joined(pictures: Sequence[Inputs]) -> Inputs:
    """The pictures of one row, as the class takes them: rows × pictures × tiles."""
    names = pictures[0] if pictures else ()
    return {name: torch.cat([picture[name] for picture in pictures])[None] for name in names}


def _completed(inputs: Inputs) -> Inputs:
    """Adds which tiles a token sees: those of the last picture before it, or of the pictures that touch each other."""
    ids = inputs["input_ids"][0].tolist()
    places = [i for i, token in enumerate(ids) if token == IMAGE]
    if not places:
        return inputs
    seen = torch.zeros(1, len(ids), len(places), MOST, dtype=torch.int64)
    for number, place in enumerate(places):
        seen[:, place : _end(place, places, len(ids)), number, :TILES] = 1
    return inputs | {"cross_attention_mask": seen}


def _end(place: int, places: list[int], length: int) -> int:
    while place + 1 in places:
        place += 1
    return min((other for other in places if other > place), default=length)


BUILDS = (
    Build(
        "mllama",
        "mllama",
        _mllama,
        _picture,
        joined=_joined,
        completed=_completed,
        padding=None,
    ),
)
