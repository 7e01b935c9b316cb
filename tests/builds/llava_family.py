"""LLaVA's kin in which pictures and videos have placeholders of their own and a newline can end a row of patches.

- llava_onevision: a whole picture, then its tiles without their padding, shrunk where they are many (C), a newline
  behind each row; several pictures in a row of the batch are not tiled. A video's frames are pooled to half their
  side and end in one newline. Features are a list with a tensor for each picture; of videos (videos, tokens, width).
- llava_next_video: the same for pictures, without shrinking; a video is pooled by 2 × 2 and has no newline, its
  features are a list (frames, tokens, width) in older releases and a tensor (videos, tokens, width) in newer.
- video_llava: a tower for pictures and one for videos; frames keep their class token. (pictures, tokens, width),
  (frames of all videos, tokens, width).
- vipllava: five layers of the tower side by side. (pictures, tokens, width).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava_onevision import modeling_llava_onevision as onevision

from builds.build import Build, Inputs, Picture
from builds.joining import padded
from builds.towers import tower

IMAGE, VIDEO = 250, 251
PATCH = 7
ODD, EVEN = 3, 4  # patches along a tile
FRAMES = 3
MOST_TILES = 2
# Height and width in tiles; A and C leave padding to take off.
SHAPES = {"A": (2, 0.5), "B": (0.7, 2), "C": (1.4, 2)}


def _pinpoints(side: int) -> list[list[int]]:
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]


def _llava_onevision(text: dict[str, Any]) -> nn.Module:
    side = PATCH * ODD
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text),
        vision_config=SiglipVisionConfig(**tower(side, PATCH), vision_use_head=False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_pinpoints(side),
        vision_aspect_ratio=f"anyres_max_{MOST_TILES}",
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _llava_next_video(text: dict[str, Any]) -> nn.Module:
    side = PATCH * EVEN
    config = LlavaNextVideoConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**tower(side, PATCH), projection_dim=48),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_pinpoints(side),
    )
    return LlavaNextVideoForConditionalGeneration(config)


def _tiled(patches: int, letter: str, generator: torch.Generator) -> tuple[int, int, Inputs]:
    """Rows and columns of the patches that are left of the tiles, and the picture's tensors."""
    side = patches * PATCH
    size = [round(side * part) for part in SHAPES[letter]]
    down, across = onevision.get_anyres_image_grid_shape(size, _pinpoints(side), side)
    kept: Tensor = onevision.unpad_image(torch.empty(1, down * patches, across * patches), size)
    pixels = torch.randn(1, 1 + down * across, 3, side, side, generator=generator)
    return kept.shape[1], kept.shape[2], {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


def _video(side: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values_videos": torch.randn(1, FRAMES, 3, side, side, generator=generator)}


def _onevision_picture(letter: str, generator: torch.Generator) -> Picture:
    if letter == "V":
        return [VIDEO] * (FRAMES * math.ceil(ODD / 2) ** 2 + 1), _video(PATCH * ODD, generator)
    rows, columns, tensors = _tiled(ODD, letter.upper(), generator)
    if letter.islower():
        return [IMAGE] * (ODD**2 + 1), tensors
    ratio = math.sqrt(rows * columns / (MOST_TILES * ODD**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return [IMAGE] * (ODD**2 + rows * (columns + 1)), tensors


class Onevision(Build):
    """LLaVA-OneVision: `batch_num_images` says how many pictures a row has; several are not tiled."""

    def sample(self, row: str, **options: Any) -> Inputs:
        words = row.split()
        pictures = sum(word in SHAPES for word in words)
        if pictures > 1:
            words = [word.lower() if word in SHAPES else word for word in words]
        inputs = super().sample(" ".join(words), **options)
        return inputs | {"batch_num_images": torch.tensor([pictures])} if pictures else inputs


def _next_picture(letter: str, generator: torch.Generator) -> Picture:
    if letter == "V":
        return [VIDEO] * (FRAMES * (EVEN // 2) ** 2), _video(PATCH * EVEN, generator)
    rows, columns, tensors = _tiled(EVEN, letter, generator)
    return [IMAGE] * (EVEN**2 + rows * (columns + 1)), tensors


def _video_llava(text: dict[str, Any]) -> nn.Module:
    config = VideoLlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**tower(PATCH * EVEN, PATCH), projection_dim=48),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=EVEN**2,
        video_seq_length=FRAMES * (EVEN**2 + 1),
    )
    return VideoLlavaForConditionalGeneration(config)


def _video_llava_picture(letter: str, generator: torch.Generator) -> Picture:
    side = PATCH * EVEN
    if letter == "V":
        return [VIDEO] * (FRAMES * (EVEN**2 + 1)), _video(side, generator)
    old = "pixel_values" not in inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
    name = "pixel_values_images" if old else "pixel_values"
    return [IMAGE] * EVEN**2, {name: torch.randn(1, 3, side, side, generator=generator)}


def _vipllava(text: dict[str, Any]) -> nn.Module:
    config = VipLlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**tower(PATCH * EVEN, PATCH, layers=5), projection_dim=48),
        image_token_index=IMAGE,
        image_seq_length=EVEN**2,
        vision_feature_layers=[-2, -3, -4, -5, 2],
    )
    return VipLlavaForConditionalGeneration(config)


def _vipllava_picture(letter: str, generator: torch.Generator) -> Picture:
    side = PATCH * EVEN
    return [IMAGE] * EVEN**2, {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


BUILDS: Sequence[Build] = (
    Onevision(
        "llava_onevision", "llava_onevision", _llava_onevision, _onevision_picture, letters="ABCV", joined=padded
    ),
    Build("llava_next_video", "llava_next_video", _llava_next_video, _next_picture, letters="ABCV", joined=padded),
    Build("video_llava", "video_llava", _video_llava, _video_llava_picture, letters="ABCV", joined=padded),
    Build("vipllava", "vipllava", _vipllava, _vipllava_picture),
)
