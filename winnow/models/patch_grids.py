"""PatchGrids: what towers share that take pictures and videos of any resolution as rows of flat patches.

Patches come in units of merge × merge, one unit behind the other, row by row and frame by frame; a unit is one token.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family, seam, token_starts


class PatchGrids(Family):
    """A family whose tower sees all patches of a batch in one sequence.

    Class attributes:
        tower_width: the setting of `vision_config` that is the width of the tower.
    """

    tower = "visual"
    blocks = "visual.blocks"
    attention = "attn"
    projector = "visual.merger"
    encoders: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "video_token_id"),
    )
    # The merger joins the patches of a unit, so single patches cannot leave before it: tokens of blocks are units.
    points = ("blocks", "blocks.mlp", "projected", "layers")
    mrope = True
    halves = ("norm2", "mlp")
    packed = True
    tower_width: ClassVar[str] = "hidden_size"

    def info(self, model: Any) -> ModelInfo:
        text = model.config.get_text_config()
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vision_width=getattr(model.config.vision_config, self.tower_width),
            vision_depth=len(seam(model.base_model, self.blocks, model)),
            feature_layer=-1,
            has_cls=False,
            points=self.points,
            mrope=self.mrope,
            merge=model.config.vision_config.spatial_merge_size,
            token_side=model.config.vision_config.spatial_merge_size * model.config.vision_config.patch_size,
        )

    def grids(self, model: Any, encoding: Encoding) -> Tensor:
        """`[items, 3]` patches of each item along time, height and width."""
        grids = encoding.inputs.get(f"{encoding.modality}_grid_thw")
        if grids is None:
            raise UnsupportedError(
                f"{type(model).__name__} needs {encoding.modality}_grid_thw beside the pixels; "
                "the processor gives both."
            )
        return grids

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        """A grid for each item. The tokens of a video are one item, wherever its frames stand in the prompt."""
        merge = model.config.vision_config.spatial_merge_size
        return tuple(Layout.grid(h // merge, w // merge, t) for t, h, w in self.grids(model, encoding).tolist())

    def tile_counts(self, model: Any, encoding: Encoding, tiles: int) -> tuple[int, ...]:
        """Frames: patches of different frames never attend to each other."""
        return tuple(self.grids(model, encoding)[:, 0].tolist())

    def tower_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        return self.layouts(model, encoding)

    def tile_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        merge = model.config.vision_config.spatial_merge_size
        return tuple(Layout.grid(h // merge, w // merge) for _, h, w in self.grids(model, encoding).tolist())

    def entries(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layout.n for layout in self.layouts(model, encoding))

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        """Blocks give a row for each patch, of which a token has the mean over its unit; the merger one for each."""
        rows = torch.cat([x.flatten(0, 1) for x in values])
        units = sum(layout.n for layout in self.layouts(model, encoding))
        rows = rows if rows.shape[0] == units else rows.unflatten(0, (units, -1)).mean(1)
        order = self.packed_order(model, encoding)
        return rows if order is None else rows[torch.argsort(order).to(rows.device)]

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        name = "pixel_values" if encoding.modality == "image" else "pixel_values_videos"
        return encoding.inputs[name].unflatten(0, (-1, model.config.vision_config.spatial_merge_size**2)).flatten(1)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return token_starts(encoding)


class WindowedPatchGrids(PatchGrids):
    """A family whose tower, and its merger, have units window by window."""

    def packed_order(self, model: Any, encoding: Encoding) -> Tensor | None:
        vision = model.config.vision_config
        order, _ = get_vision_window_index(
            self.grids(model, encoding),
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return order
