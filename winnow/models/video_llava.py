"""Video-LLaVA: one CLIP tower for pictures, one for videos. Frames of videos keep their [CLS] in the language model."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.layout import Layout, cls_token, grid_rows
from winnow.models.family import Encoding
from winnow.models.towers import KnownTower, check_lengths, patch_size, unfolded


class VideoLlava(KnownTower):
    name = "video_llava"
    model_types = ("video_llava",)
    tower = "video_tower"
    blocks = "video_tower.encoder.layers"
    other_blocks = ("image_tower.encoder.layers",)
    encoders = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "video_token_id"),
    )

    def tiles(self, encoding: Encoding) -> Tensor:
        """`[pictures or frames, 3, H, W]` what the tower is given."""
        given = encoding.inputs
        if encoding.modality == "video":
            return given["pixel_values_videos"].flatten(0, 1)
        found = given.get("pixel_values")
        return given["pixel_values_images"] if found is None else found  # its name in older releases

    def side(self, model: Any) -> int:
        """Patches along one side of a picture."""
        return model.config.vision_config.image_size // patch_size(model)

    def frames(self, encoding: Encoding) -> int:
        """Frames of each item."""
        return encoding.inputs["pixel_values_videos"].shape[1] if encoding.modality == "video" else 1

    def lengths(self, model: Any, encoding: Encoding, pooled: Sequence[Tensor]) -> tuple[int, ...]:
        """What is pooled has an element for each frame."""
        frames = super().lengths(model, encoding, pooled)
        count = self.frames(encoding)
        return tuple(sum(frames[start : start + count]) for start in range(0, len(frames), count))

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        shows_cls = encoding.modality == "video" or model.config.vision_feature_select_strategy == "full"
        layout = _frames(self.side(model), self.frames(encoding), shows_cls)
        found = (layout,) * len(encoding.lengths)
        check_lengths(model, encoding, tuple(layout.n for layout in found))
        return found

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        rows = torch.cat(list(values))
        return rows[:, rows.shape[1] - self.side(model) ** 2 :].flatten(0, 1)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        return unfolded(self.tiles(encoding), patch_size(model)).flatten(0, 1)


@functools.lru_cache(maxsize=64)
def _frames(side: int, frames: int, cls: bool) -> Layout:
    """Frames one behind the other, each behind its [CLS]."""
    whole = grid_rows(side, side, frames)
    parts = []
    for frame in range(frames):
        own = slice(frame * side**2, (frame + 1) * side**2)
        parts += [cls_token()] * cls + [{name: rows[own] for name, rows in whole.items()}]
    return Layout.of(("video_llava", side, frames, cls), parts)
