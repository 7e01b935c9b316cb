"""GIT and BLIP: pictures that no placeholder stands for.

GIT puts a picture's patches in front of the embedded words inside its forward (`cat` in the batch's order, one picture
for each row), so `input_ids` and the logits differ in length; patches see each other, words are causal, and masks are
made for both together. Positions are those of the words alone and do not know of padding. A video is frames one after
the other, each with an embedding of its time.

BLIP's words read the picture in cross-attention layers; their positions do not know of padding either. Its `generate`
takes the last id of the prompt for a separator and drops it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration, GitConfig, GitForCausalLM

from builds.build import Build, Picture
from builds.terms import in_terms

SIDE, PATCH, FRAMES = 56, 14, 3
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def _git(text: dict[str, Any], *, frames: int | None) -> nn.Module:
    settings = in_terms(text, without=("num_key_value_heads",))
    return GitForCausalLM(GitConfig(vision_config=TOWER, num_image_with_embedding=frames, **settings))


def _blip(text: dict[str, Any]) -> nn.Module:
    settings = in_terms(text, without=("num_key_value_heads",))
    config = BlipConfig(
        text_config=settings | {"sep_token_id": text["eos_token_id"], "tie_word_embeddings": False},
        vision_config=TOWER,
        tie_word_embeddings=False,
    )
    return BlipForConditionalGeneration(config)


def _picture(letter: str, generator: torch.Generator) -> Picture:
    return [], {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator)}


def _video(letter: str, generator: torch.Generator) -> Picture:
    return [], {"pixel_values": torch.randn(1, FRAMES, 3, SIDE, SIDE, generator=generator)}


IN_FRONT = "the forward puts a picture's tokens in front of the words; no placeholders stand for them in the prompt"

BUILDS = (
    Build("git", "git", partial(_git, frames=None), _picture, padding="right", cannot=IN_FRONT),
    Build("git_video", "git", partial(_git, frames=FRAMES), _video, letters="V", padding="right", cannot=IN_FRONT),
    Build("blip", "blip", _blip, _picture, padding="right", cannot="words read a picture through cross-attention"),
)
