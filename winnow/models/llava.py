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
    points: ClassVar[tuple[str, ...]] = ("blocks", "blocks.mlp", "features", "projected", "layers")
    short = True
    streams: ClassVar[bool] = True

    def info(self, model: Any) -> ModelInfo:
        return replace(super().info(model), points=self.offered(model.config, self.has_cls(model)))

    def offered(self, config: Any, has_cls: bool) -> tuple[str, ...]:
        """The points of a checkpoint: none of the tower where the projector reads several of its layers."""
        if not isinstance(config.vision_feature_layer, int):
            return ("projected", "layers")
        # Where [CLS] itself enters the LM, its row would have to survive beside the item's tokens.
        reads_cls = has_cls and config.vision_feature_select_strategy == "full"
        return tuple(p for p in self.points if not (reads_cls and p.startswith("blocks")))

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
        return self.tile_layouts(model, encoding, counts)

    def tile_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        side = self.side(model)
        return (Layout.grid(side, side, cls=self.info(model).has_cls),) * len(counts)

    def check_tower_call(self, model: Any, encoding: Encoding) -> None:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given, known = encoding.inputs.get(name), getattr(model.config, name)
            if given is not None and given != known:
                raise UnsupportedError(
                    f"{name}={given!r} was given to {type(model).__name__}, whose configuration says {known!r}; a plan "
                    "that acts at blocks follows the configuration: change it there before winnow.compress."
                )

    def entries(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[int, ...]:
        return (self.side(model) ** 2,) * len(counts)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        cells, starts, at = self.side(model) ** 2, [], 0
        for tiles in self.tile_counts(model, encoding, len(encoding.lengths)):
            starts.append(at)
            at += tiles * cells
        return tuple(starts)
