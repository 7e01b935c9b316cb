"""MiniCPM-V 4.6: a picture and its slices, of any size; patches are merged 2 × 2 inside the tower and again behind it.

Each slice stands between marks of its own in the prompt, so each is an item: a budget of 64 tokens is 64 of each slice.
A frame of a video is an item; frames are one item where the caller names their video.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.layout import Layout
from winnow.models.family import Encoding
from winnow.models.towers import KnownTower, check_lengths, merged, patch_size, starts


class MiniCPMV46(KnownTower):
    name = "minicpmv4_6"
    model_types = ("minicpmv4_6",)
    blocks = "vision_tower.encoder.layers"
    projector = "merger.mlp.0"
    frames_apart = True
    tiles_apart = True
    encoders = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "video_token_id"),
    )

    def check(self, model: Any) -> None:
        config = model.config
        window, kernel = tuple(config.vision_config.window_kernel_size), tuple(config.merge_kernel_size)
        if config.merger_times != 1 or window != (2, 2) or kernel != (2, 2):
            raise UnsupportedError(
                f"{type(model).__name__} merges patches with merger_times={config.merger_times}, "
                f"merge_kernel_size={kernel} and window_kernel_size={window}; supported are 1, (2, 2) and (2, 2)."
            )

    def merge(self, model: Any) -> int:
        return 2 if model.config.downsample_mode == "4x" else 4

    def merge_now(self, model: Any, encoding: Encoding) -> int:
        """Patches of one side that make a token in this call."""
        mode = encoding.inputs.get("downsample_mode")
        return self.merge(model) if not mode else 2 if mode == "4x" else 4

    def grids(self, encoding: Encoding) -> tuple[tuple[int, int], ...]:
        """Patches down and across each slice."""
        sizes = encoding.inputs["target_sizes" if encoding.modality == "image" else "target_sizes_videos"]
        repeats = 1 if encoding.modality == "image" else encoding.inputs["pixel_values_videos"].shape[0]
        return tuple((int(h), int(w)) for h, w in torch.as_tensor(sizes).tolist()) * repeats

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        merge, grids = self.merge_now(model, encoding), self.grids(encoding)
        parts = encoding.parts or (1,) * len(grids)
        found = []
        for first, frames in zip(starts(parts), parts, strict=True):
            own = set(grids[first : first + frames])
            if len(own) > 1:
                raise UnsupportedError(f"the frames of a video have patches of {sorted(own)}; give frames of one size.")
            ((h, w),) = own
            found.append(Layout.grid(h // merge, w // merge, frames))
        check_lengths(model, encoding, tuple(layout.n for layout in found))
        return tuple(found)

    def windows(self, model: Any, encoding: Encoding, tokens: int) -> tuple[int, ...]:
        """FlashAttention gets all slices at once, others get them one by one."""
        if "flash" not in (model.base_model.vision_tower.config._attn_implementation or ""):
            return (tokens,)
        for merge in (1, 2):
            own = tuple(h // merge * (w // merge) for h, w in self.grids(encoding))
            if sum(own) == tokens:
                return own
        return (tokens,)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        """Blocks before the merger in the tower give a row for each patch, later ones one for each 2 × 2."""
        rows, grids = torch.cat([x.flatten(0, 1) for x in values]), self.grids(encoding)
        tokens, patches = sum(encoding.lengths), sum(h * w for h, w in grids)
        if rows.shape[0] == tokens:
            return rows
        left = self.merge_now(model, encoding)
        done = 1 if rows.shape[0] == patches else 2
        slices = rows.split([h // done * (w // done) for h, w in grids])
        own = zip(slices, grids, strict=True)
        return torch.cat([merged(x[None], h // done, w // done, left // done)[0] for x, (h, w) in own])

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        """Patches of a slice stand side by side in one strip of pixels."""
        pixels = encoding.inputs["pixel_values" if encoding.modality == "image" else "pixel_values_videos"]
        size, merge = patch_size(model), self.merge_now(model, encoding)
        strips = pixels.permute(1, 2, 0, 3).flatten(2).float()
        rows = strips.unflatten(2, (-1, size)).permute(2, 0, 1, 3).flatten(1)
        found = []
        for own, (h, w) in zip(rows.split([h * w for h, w in self.grids(encoding)]), self.grids(encoding), strict=True):
            squares = own.unflatten(0, (h // merge, merge, w // merge, merge)).transpose(1, 2)
            found.append(squares.flatten(2, 4).flatten(0, 1))
        return torch.cat(found)
