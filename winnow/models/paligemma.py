"""PaliGemma and PaliGemma 2: square pictures, a token for each patch; the whole prompt sees itself."""

from typing import Any

from torch import Tensor

from winnow.core.layout import Layout
from winnow.models.family import Encoding
from winnow.models.square_pictures import SquarePictures


class PaliGemma(SquarePictures):
    name = "paligemma"
    model_types = ("paligemma",)
    points = ("blocks", "blocks.mlp", "features", "projected", "layers")

    def features(self, model: Any, encoding: Encoding, output: Any) -> Tensor:
        return output.last_hidden_state

    def tile_counts(self, model: Any, encoding: Encoding, tiles: int) -> tuple[int, ...]:
        return (1,) * tiles

    def tile_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        side = self.side(model)
        return (Layout.grid(side, side),) * len(counts)

    def tower_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        return self.tile_layouts(model, encoding, counts)

    def entries(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[int, ...]:
        return (self.side(model) ** 2,) * len(counts)
