"""Pictures of several shapes as methods see them, and two kinds of models that they are to believe in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from winnow.core.info import ModelInfo
from winnow.core.layout import Layout, cls_token, grid_rows

WITH_CLS = ModelInfo(
    "a model with [CLS]",
    depth=8,
    width=32,
    vision_depth=12,
    feature_layer=-2,
    has_cls=True,
    sound_depth=4,
    points=("blocks", "blocks.mlp", "features", "projected", "layers", "kv"),
    head_dim=16,
)
WITHOUT_CLS = ModelInfo(
    "a model without [CLS]",
    depth=8,
    width=32,
    vision_depth=8,
    has_cls=False,
    points=("projected", "layers", "kv"),
    mrope=True,
    merge=2,
    head_dim=16,
)


@dataclass(frozen=True)
class Picture:
    """One picture as the tower sees it (tile by tile, [CLS] before each) and as it enters the LM."""

    name: str
    tower: Layout
    lm: Layout

    @property
    def tile(self) -> Layout:
        """One of its tiles, as steps at `blocks` see it."""
        h, w = self.tower.place[self.tower.tile == 0, 2:].max(0) + 1
        return Layout.grid(int(h), int(w), cls=True)

    @staticmethod
    def grid(h: int, w: int) -> Picture:
        """A single tile."""
        return Picture(f"{h}x{w}", Layout.grid(h, w, cls=True), Layout.grid(h, w))

    @staticmethod
    def tiled(side: int, rows: int, cols: int) -> Picture:
        """A thumbnail and a mosaic of rows × cols tiles, with a newline after each mosaic row."""
        key, cells = ("tiled", side, rows, cols), side * side
        line, col = np.meshgrid(np.arange(rows * side), np.arange(cols * side), indexing="ij")
        tile = 1 + line // side * cols + col // side
        cell = tile * cells + line % side * side + col % side
        mosaic = grid_rows(rows * side, cols * side, grid=1, tile=tile[None], cell=cell[None], newline=True)
        lm = Layout.of(key, [grid_rows(side, side), mosaic])
        parts = [cls_token(), grid_rows(side, side)]
        for t in range(rows * cols):
            crop = grid_rows(side, side, grid=1, tile=t + 1, cell=(t + 1) * cells + np.arange(cells))
            crop["place"] += np.array([0, 0, t // cols * side, t % cols * side])
            parts += [cls_token(), crop]
        return Picture(f"tiled{side}-{rows}x{cols}", Layout.of((*key, "tower"), parts), lm)


PICTURES = (Picture.grid(1, 1), Picture.grid(1, 7), Picture.grid(6, 5), Picture.tiled(4, 2, 1))
