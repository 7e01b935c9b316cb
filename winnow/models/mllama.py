"""Llama 3.2 Vision: pictures are keys and values of cross-attention layers, and not tokens of the sequence.

A picture is up to four tiles of one canvas, each a [CLS] and a grid of patches; empty tiles fill the rest of its place.
A layout covers all of this place: patches of real tiles are content, their [CLS] stay where any patch does, and empty
tiles, which no word behind the picture reads, leave with the first reduction.
"""

import functools
from typing import Any

import numpy as np

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout, grid_rows, padding, separators
from winnow.models.family import Family


class Mllama(Family):
    name = "mllama"
    model_types = ("mllama",)
    tower = blocks = None
    encoders = ()
    points = ("projected",)
    cross = True

    def check(self, model: Any) -> None:
        for name in ("vision_model", "language_model", "multi_modal_projector"):
            if not hasattr(model.base_model, name):
                raise UnsupportedError(f"{type(model).__name__} has no {name}; load MllamaForConditionalGeneration.")

    def info(self, model: Any) -> ModelInfo:
        text = model.config.get_text_config()
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vision_depth=0,
            vision_width=model.config.vision_config.vision_output_dim,
            points=self.points,
        )

    def cross_layers(self, model: Any) -> tuple[int, ...]:
        return tuple(model.config.get_text_config().cross_attention_layers)

    def cross_layouts(self, model: Any, called: dict[str, Any]) -> tuple[tuple[Layout | None, ...], ...]:
        vision = model.config.vision_config
        side, shapes = vision.image_size // vision.patch_size, vision.supported_aspect_ratios
        rows = called["aspect_ratio_ids"].tolist()
        wrong = [kind for row in rows for kind in row if not 0 <= kind <= len(shapes)]
        if wrong:
            raise UnsupportedError(f"aspect_ratio_ids: got {wrong[0]}; this model knows 0 … {len(shapes)}.")
        whole = vision.max_num_tiles
        known = [None, *(_layout(side, (high, wide), whole) for high, wide in shapes)]
        return tuple(tuple(known[kind] for kind in row) for row in rows)


@functools.cache
def _layout(side: int, tiles: tuple[int, int], whole: int) -> Layout:
    """The place of one picture: `whole` tiles, of which the first rows × columns are real, row by row of the canvas."""
    high, wide = tiles
    each = 1 + side * side
    parts = []
    for tile in range(high * wide):
        row, col = divmod(tile, wide)
        box = (col / wide, row / high, (col + 1) / wide, (row + 1) / high)
        cell = tile * each + 1 + np.arange(side * side)
        patches = grid_rows(side, side, tile=tile, cell=cell, box=box)
        patches["place"][:, 2:] += np.array([row, col]) * side  # neighbours across the seams of the canvas
        parts += [separators(1), patches]
    parts.append(padding((whole - high * wide) * each))
    return Layout.of(("mllama", side, high, wide, whole), parts)
