"""Classes whose tower is timm's. The toolkit does not need timm, so that a tower of transformers with outputs of the
same shape stands in; what is the class's own begins behind the tower.

- fast_vlm: a convolutional tower, (pictures, channels, rows, columns); features (pictures, tokens, width).
- perception_lm: a transformer with a class token, tokens pooled by 2 × 2 behind the projector, tiles with a thumbnail
  and videos. Pixels are (pictures, tiles, 3, side, side), so that all pictures of a batch have equally many tiles;
  features (tiles of all pictures, tokens, width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    ResNetConfig,
    TimmWrapperConfig,
)

from builds.build import Build, Picture
from builds.joining import padded
from builds.towers import tower

IMAGE, VIDEO = 250, 251
FAST_SIDE, FAST_TOKENS = 64, 16  # a stride of 16
SIDE, PATCH, TOKENS = 24, 4, 9  # a tile of 6 × 6 patches is 3 × 3 tokens
TILES, FRAMES = 3, 4  # tiles with the thumbnail


def _fast_vlm(text: dict[str, Any]) -> nn.Module:
    vision = ResNetConfig(embedding_size=24, hidden_sizes=[24, 48, 48], depths=[1, 1, 1], layer_type="basic")
    vision.hidden_size = vision.hidden_sizes[-1]
    config = FastVlmConfig(
        text_config=Qwen2Config(**text), vision_config=vision, image_token_index=IMAGE, image_seq_length=FAST_TOKENS
    )
    return FastVlmForConditionalGeneration(config)


def _fast_picture(letter: str, generator: torch.Generator) -> Picture:
    pixels = torch.randn(1, 3, FAST_SIDE, FAST_SIDE, generator=generator)
    return [IMAGE] * FAST_TOKENS, {"pixel_values": pixels}


class StandInConfig(TimmWrapperConfig):
    """A configuration for which `AutoModel` makes `StandIn`."""

    model_type = "timm_stand_in"


class StandIn(PreTrainedModel):
    """CLIP's tower in the place of timm's PE: (pictures, 1 + patches, width), the class token first."""

    config_class = StandInConfig

    def __init__(self, config: StandInConfig):
        super().__init__(config)
        width = config.model_args["embed_dim"]
        self.clip = CLIPVisionModel(CLIPVisionConfig(**tower(SIDE, PATCH) | {"hidden_size": width}))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        return self.clip(pixel_values, **kwargs)


AutoModel.register(StandInConfig, StandIn)


def _perception_lm(text: dict[str, Any]) -> nn.Module:
    config = PerceptionLMConfig(
        text_config=LlamaConfig(**text),
        vision_config=StandInConfig(architecture="stand_in", model_args={"embed_dim": 48}),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return PerceptionLMForConditionalGeneration(config)


def _perception_picture(letter: str, generator: torch.Generator) -> Picture:
    video = letter == "V"
    tiles = FRAMES if video else TILES
    pixels = torch.randn(1, tiles, 3, SIDE, SIDE, generator=generator)
    return [VIDEO if video else IMAGE] * (TOKENS * tiles), {"pixel_values_videos" if video else "pixel_values": pixels}


BUILDS = (
    Build("fast_vlm", "fast_vlm", _fast_vlm, _fast_picture),
    Build("perception_lm", "perception_lm", _perception_lm, _perception_picture, letters="ABCV", joined=padded),
)
