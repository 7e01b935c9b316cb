"""Clips with still and moving parts and a cut, and a build of LLaVA-NeXT-Video that is shown them."""

from __future__ import annotations

from typing import Any

import torch
from builds.build import Build, Inputs, Picture
from builds.llava_family import IMAGE, PATCH, VIDEO
from builds.towers import tower
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

SIDE = 6 * PATCH  # of a frame; pooled by 2 × 2 it has 3 × 3 tokens
# Frames, and the first frame of the second scene. All clips of a batch have as many frames.
LENGTHS = {"W": (8, 3), "X": (5, 2)}


def scenes(noise: Tensor, moving: Tensor, cut: int) -> Tensor:
    """Two scenes, in which some cells are new in every frame, and the others nearly what they were first.

    Args:
        noise: `[t, cells, …]`.
        moving: `[cells]` which cells are new in every frame.
        cut: the first frame of the second scene.
    """
    first = noise[[0] * cut + [cut] * (len(noise) - cut)]
    return torch.where(moving.reshape(-1, *[1] * (noise.ndim - 2)), noise, first + 0.2 * noise)


def _llava_next_video(text: dict[str, Any]) -> nn.Module:
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**tower(SIDE, PATCH, layers=5), projection_dim=48),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[SIDE, SIDE]],
    )
    return LlavaNextVideoForConditionalGeneration(config)


def _video(letter: str, generator: torch.Generator) -> Picture:
    frames, cut = LENGTHS[letter]
    noise = torch.randn(frames, SIDE, 3, SIDE, generator=generator)
    pixels = scenes(noise, torch.arange(SIDE) < SIDE // 3, cut).transpose(1, 2)[None]
    inputs: Inputs = {"pixel_values_videos": pixels}
    return [VIDEO] * (frames * (SIDE // PATCH // 2) ** 2), inputs


CLIPS = {"llava_next_video": Build("llava_next_video", "llava_next_video", _llava_next_video, _video, letters="WX")}
