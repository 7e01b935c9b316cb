"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT; the patches of a video's frames are pooled before the projector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.layout import Layout
from winnow.models.family import Encoding
from winnow.models.llava_next import LlavaNext
from winnow.models.towers import check_lengths, merged, patch_size, starts, unfolded


class LlavaNextVideo(LlavaNext):
    name = "llava_next_video"
    model_types = ("llava_next_video",)
    streams = False
    short = False
    encoders = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "video_token_id"),
    )
    # Frames are pooled before the projector, so single patches of videos cannot leave there.
    points = ("projected", "layers")

    def pooled_side(self, model: Any) -> int:
        """Tokens along one side of a frame."""
        return self.side(model) // model.config.spatial_pool_stride

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        if encoding.modality == "image":
            return super().layouts(model, encoding)
        side, frames = self.pooled_side(model), encoding.inputs["pixel_values_videos"].shape[1]
        found = (Layout.grid(side, side, frames),) * len(encoding.lengths)
        check_lengths(model, encoding, tuple(layout.n for layout in found))
        return found

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        rows, side = torch.cat(list(values)), self.side(model)
        if encoding.modality == "video" and rows.shape[1] == side**2:
            rows = merged(rows, side, side, model.config.spatial_pool_stride)
        return rows.flatten(0, 1)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        if encoding.modality == "image":
            return super().patches(model, encoding)
        frames = encoding.inputs["pixel_values_videos"].flatten(0, 1)
        return unfolded(frames, patch_size(model) * model.config.spatial_pool_stride).flatten(0, 1)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return super().cell_starts(model, encoding) if encoding.modality == "image" else starts(encoding.lengths)
