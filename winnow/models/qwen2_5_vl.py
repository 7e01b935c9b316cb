"""Qwen2.5-VL: any resolution, 2 × 2 patches to a token, 3-D positions, windows in most blocks, no [CLS]."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family, seam


class Qwen25VL(Family):
    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    short = True
    tower = "visual"
    blocks = "visual.blocks"
    attention = "attn"
    projector = "visual.merger"
    encoders = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "video_token_id"),
    )
    # The merger concatenates 2 × 2 patches, so single patches cannot leave before it: tokens of blocks are such units.
    points = ("blocks", "blocks.mlp", "projected", "layers")
    mrope = True
    halves = ("norm2", "mlp")
    packed = True

    def info(self, model: Any) -> ModelInfo:
        text = model.config.get_text_config()
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vision_width=model.config.vision_config.hidden_size,
            vision_depth=len(seam(model.base_model, self.blocks, model)),
            feature_layer=-1,
            has_cls=False,
            points=self.points,
            mrope=True,
            merge=model.config.vision_config.spatial_merge_size,
        )

    def grids(self, encoding: Encoding) -> Tensor:
        """`[items, 3]` patches of each item along time, height and width."""
        grids = encoding.inputs.get(f"{encoding.modality}_grid_thw")
        if grids is None:
            raise UnsupportedError(
                f"Qwen2.5-VL needs {encoding.modality}_grid_thw beside the pixels; the processor gives both."
            )
        return grids

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        merge = model.config.vision_config.spatial_merge_size
        return tuple(Layout.grid(h // merge, w // merge, t) for t, h, w in self.grids(encoding).tolist())

    def tile_counts(self, model: Any, encoding: Encoding, tiles: int) -> tuple[int, ...]:
        """Frames: patches of different frames never attend to each other."""
        return tuple(self.grids(encoding)[:, 0].tolist())

    def tower_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        return self.layouts(model, encoding)

    def tile_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        merge = model.config.vision_config.spatial_merge_size
        return tuple(Layout.grid(h // merge, w // merge) for _, h, w in self.grids(encoding).tolist())

    def entries(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layout.n for layout in self.layouts(model, encoding))

    def packed_order(self, model: Any, encoding: Encoding) -> Tensor | None:
        """Units stand window by window."""
        vision = model.config.vision_config
        order, _ = get_vision_window_index(
            self.grids(encoding),
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return order

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        """Blocks give a row for each patch, the merger one for each unit of 2 × 2; both in the order of windows."""
        unit = model.config.vision_config.spatial_merge_size**2
        rows = torch.cat([x.flatten(0, 1) for x in values])
        order: Any = self.packed_order(model, encoding)
        units = rows if rows.shape[0] == len(order) else rows.unflatten(0, (-1, unit)).mean(1)
        return units[torch.argsort(order).to(units.device)]

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        name = "pixel_values" if encoding.modality == "image" else "pixel_values_videos"
        return encoding.inputs[name].unflatten(0, (-1, model.config.vision_config.spatial_merge_size**2)).flatten(1)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        starts, at = [], 0
        for length in encoding.lengths:
            starts.append(at)
            at += length
        return tuple(starts)
