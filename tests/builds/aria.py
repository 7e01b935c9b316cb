"""Aria: a mixture of experts reads what a few queries took from each crop by cross attention; masks say which patches
of a crop are real. Features are a tensor (crops, queries, width)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AriaConfig, AriaForConditionalGeneration
from transformers.models.aria.configuration_aria import AriaTextConfig

from builds.build import Build, Picture
from builds.towers import tower

IMAGE = 250
SIDE, PATCH, TOKENS = 24, 4, 10  # queries for the 6 × 6 patches of a crop
CROPS = {"A": 2, "B": 1, "C": 3}
SIZES = {"A": (24, 24), "B": (12, 24), "C": (24, 16)}  # what is real of a crop


class Mixture(Build):
    """Experts are filled as if their first axis were an output; here they get the size of other linear maps."""

    def model(self, **options: Any) -> nn.Module:
        made = super().model(**options)
        for name, weight in made.named_parameters():
            if ".experts." in name:  # (experts, in, out)
                weight.data /= weight.data.float().std() * math.sqrt(weight.shape[1])
        return made


def _aria(text: dict[str, Any]) -> nn.Module:
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = AriaConfig(
        text_config=AriaTextConfig(**experts | text),
        vision_config=tower(SIDE, PATCH, model_type="idefics3_vision"),
        projector_patch_to_query_dict={(SIDE // PATCH) ** 2: TOKENS, (2 * SIDE // PATCH) ** 2: 2 * TOKENS},
        image_token_index=IMAGE,
    )
    return AriaForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    count, (height, width) = CROPS[letter], SIZES[letter]
    mask = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    mask[:, :height, :width] = True
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator) * mask[:, None]
    return [IMAGE] * (TOKENS * count), {"pixel_values": pixels, "pixel_mask": mask}


BUILDS = (Mixture("aria", "aria", _aria, _picture),)
