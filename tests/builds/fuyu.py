"""Fuyu: a picture's patches go straight into the language model (Persimmon) through one linear layer, without a tower.

The processor hands over patches, not pixels (`image_patches`; newer releases say `pixel_values` inside and take both),
each row of which ends with a newline token; a token that begins the text follows the picture. `get_image_features`
gives them as `last_hidden_state` and has no pooled output. Only half of a head's channels are rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import FuyuConfig, FuyuForCausalLM, PersimmonConfig

from builds.build import BOS, Build, Picture
from builds.terms import in_terms

IMAGE, NEWLINE = 250, 251
PATCH = 6
_SIZES = {"A": (4, 5), "B": (3, 8), "C": (4, 4)}  # patches, height and width


def _fuyu(text: dict[str, Any]) -> nn.Module:
    known = in_terms(text, without=("num_key_value_heads",))  # it has no groups of heads
    rope = {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5}
    config = FuyuConfig(
        text_config=PersimmonConfig(**{"rope_parameters": rope, "qk_layernorm": True} | known),
        hidden_size=text["hidden_size"],
        patch_size=PATCH,
        image_token_id=IMAGE,
    )
    return FuyuForCausalLM(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    height, width = _SIZES[letter]
    patches = torch.randn(height * width, 3 * PATCH**2, generator=generator)
    return [*([IMAGE] * width + [NEWLINE]) * height, BOS], {"image_patches": patches}


BUILDS = (Build("fuyu", "fuyu", _fuyu, _picture),)
