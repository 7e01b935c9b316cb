"""LLaVA: one square picture, one grid; a CLIP tower with [CLS] or a SigLIP tower without."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.family import Encoding, join_tiles
from winnow.models.towers import KnownTower


class Llava(KnownTower):
    name = "llava"
    model_types = ("llava",)
    points: ClassVar[tuple[str, ...]] = ("features", "projected", "layers")
    short = True

    def info(self, model: Any) -> ModelInfo:
        known = super().info(model)
        # Several layers side by side have no tower token that could leave before the projector.
        return known if isinstance(self.feature_layer(model), int) else replace(known, points=KnownTower.points)

    def side(self, model: Any) -> int:
        """Patches along one side of a tile."""
        vision = model.config.vision_config
        return vision.image_size // vision.patch_size

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        side = self.side(model)
        cls = model.config.vision_feature_select_strategy == "full" and self.info(model).has_cls
        layout = Layout.grid(side, side, cls=cls)
        if any(n != layout.n for n in encoding.lengths):
            raise UnsupportedError(
                f"{type(model).__name__} gave items of {encoding.lengths} tokens where {layout.n} were expected; "
                "only towers of a fixed grid are supported in this family."
            )
        return (layout,) * len(encoding.lengths)

    def features(self, model: Any, encoding: Encoding, output: Any) -> Tensor:
        layer = encoding.inputs.get("vision_feature_layer")
        return output.hidden_states[model.config.vision_feature_layer if layer is None else layer]

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        return join_tiles(values)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        pixels, size = self.tiles(model, encoding), model.config.vision_config.patch_size
        return torch.nn.functional.unfold(pixels.float(), size, stride=size).transpose(1, 2).flatten(0, 1)

    def tiles(self, model: Any, encoding: Encoding) -> Tensor:
        """`[tiles, 3, H, W]` the pixels of all items."""
        return encoding.inputs["pixel_values"]

    def tile_counts(self, model: Any, encoding: Encoding, tiles: int) -> tuple[int, ...]:
        return (1,) * tiles

    def tower_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        side = self.side(model)
        return (Layout.grid(side, side, cls=self.info(model).has_cls),) * len(counts)

    def entries(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[int, ...]:
        return (self.side(model) ** 2,) * len(counts)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        cells, starts, at = self.side(model) ** 2, [], 0
        for tiles in self.tile_counts(model, encoding, len(encoding.lengths)):
            starts.append(at)
            at += tiles * cells
        return tuple(starts)
