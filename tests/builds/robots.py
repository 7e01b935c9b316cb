"""π0: a robot's pictures and words fill a cache, from which a second model works out actions.

The first model is a PaliGemma without its head, called with the features in its `inputs_embeds` (its own scatter never
runs) and with every token seeing every other; only its cache is used. The second (`dit`, a Gemma of another width but
with as many layers and heads) reads that cache with a token of state and noisy actions after it, its masks made outside
of it; sampling calls it once a step and cuts the cache back after each. There is no `generate`, no head over words, and
the base model has no `get_image_features` of its own.

Pictures come as rows × cameras, with a mask of the cameras that a row has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GemmaConfig, PaliGemmaConfig, PI0Config, PI0ForConditionalGeneration, SiglipVisionConfig

from builds.build import Build, Inputs, Picture

IMAGE = 250
SIDE, PATCH = 56, 14
STATE, ACTION, CHUNK = 8, 8, 6
_CAMERAS = ("pixel_values", "pixel_attention_mask")


def _pi0(text: dict[str, Any]) -> nn.Module:
    settings = {"head_dim": 16} | text
    config = PI0Config(
        vlm_config=PaliGemmaConfig(
            text_config=GemmaConfig(**settings),
            vision_config=SiglipVisionConfig(
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=PATCH,
                vision_use_head=False,
            ),
            projection_dim=text["hidden_size"],
            image_token_id=IMAGE,
        ),
        dit_config=GemmaConfig(**settings | {"hidden_size": 32, "intermediate_size": 64}),
        chunk_size=CHUNK,
        max_state_dim=STATE,
        max_action_dim=ACTION,
        num_inference_steps=2,
    )
    return PI0ForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    """One camera's picture; with it a state and noise, of which a row takes those of its first picture."""
    inputs = {
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator),
        "pixel_attention_mask": torch.ones(1, dtype=torch.bool),
        "state": torch.randn(1, STATE, generator=generator),
        "noise": torch.randn(1, CHUNK, ACTION, generator=generator),
        "timestep": torch.tensor([0.7]),
    }
    return [IMAGE] * (SIDE // PATCH) ** 2, inputs


def _joined(parts: Sequence[Inputs]) -> Inputs:
    """Pictures side by side as the cameras of a row; rows, which have a dimension more, below one another."""
    if not parts:
        return {}
    if parts[0]["pixel_values"].ndim == 4:
        cameras = {name: torch.cat([part[name] for part in parts])[None] for name in _CAMERAS}
        return parts[0] | cameras
    most = max(part["pixel_values"].shape[1] for part in parts)
    padded = [part | {name: _wide(part[name], most) for name in _CAMERAS} for part in parts]
    return {name: torch.cat([part[name] for part in padded]) for name in padded[0]}


def _wide(row: Tensor, cameras: int) -> Tensor:
    """A row padded with zeros to the number of cameras, which are its second dimension."""
    return torch.cat([row, row.new_zeros(1, cameras - row.shape[1], *row.shape[2:])], dim=1)


ACTIONS = "it answers with actions that a second model reads off the language model's cache; it says no words"

BUILDS = (Build("pi0", "pi0", _pi0, _picture, joined=_joined, cannot=ACTIONS),)
