"""What each patch of a scene shows: the dense targets of tower pretraining and of alignment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from winnow.reference.vocabulary import TOKEN_ID
from winnow.world.items import Item, Scene
from winnow.world.names import CLUTTER, COLORS, GLYPHS, SHAPES, WORDS

CLASSES = ("background", *GLYPHS, *SHAPES, *WORDS, "number", "bar", "chart", "document", *CLUTTER)
COLOR_NAMES = tuple(COLORS)
RANKS = ("", "shortest", "middle", "tallest")
# Rows of the targets of one scene, each a grid of integers. Row "center" is 1 on the patch of a thing's centre.
ROWS = ("class", "color", "tens", "ones", "rank", "center")
ROW_SIZES = (len(CLASSES), len(COLOR_NAMES) + 1, 11, 11, len(RANKS), 2)
_CLASS_ID = {name: index for index, name in enumerate(CLASSES)}
_COLOR_ID = {name: index + 1 for index, name in enumerate(COLOR_NAMES)}
EXTENTS = (0, 34, 40, 46, 53)  # lower limits of size classes, in pixels of a picture of 224
VISIBLE = 0.15  # share of a patch from which it shows a thing


def patch_cover(item: Item, size: int, grid: int) -> tuple[slice, slice, np.ndarray]:
    """The patches that an item touches, and the share of each that its ink covers."""
    patch = size // grid
    box = item.box
    rows = slice(box.y0 // patch, -(-box.y1 // patch))
    columns = slice(box.x0 // patch, -(-box.x1 // patch))
    area = np.zeros(((rows.stop - rows.start) * patch, (columns.stop - columns.start) * patch), np.float32)
    y, x = box.y0 - rows.start * patch, box.x0 - columns.start * patch
    area[y : y + box.y1 - box.y0, x : x + box.x1 - box.x0] = 1.0 if item.alpha is None else item.alpha / 255
    share = area.reshape(rows.stop - rows.start, patch, columns.stop - columns.start, patch).mean((1, 3))
    return rows, columns, share


def dense_targets(scene: Scene, grid: int) -> np.ndarray:
    """int16 [len(ROWS), grid, grid]; where things overlap, the one that covers more of the patch (panels: least)."""
    out = np.zeros((len(ROWS), grid, grid), np.int16)
    best = np.full((grid, grid), VISIBLE, np.float32)
    for item in scene.objects:
        rows, columns, share = patch_cover(item, scene.size, grid)
        if item.kind == "panel":
            share = share * 0.3
        current = best[rows, columns]
        wins = share > current
        current[wins] = share[wins]
        number = item.kind == "text" and item.text.isdigit()
        rank = RANKS.index(item.rank or "middle") if item.kind == "bar" else 0
        values = (
            _CLASS_ID[item.name],
            _COLOR_ID.get(item.color, 0),
            int(item.text[0]) + 1 if number else 0,
            int(item.text[1]) + 1 if number else 0,
            rank,
        )
        for row, value in enumerate(values):
            out[row, rows, columns][wins] = value
    patch = scene.size // grid
    for item in scene.objects:
        if item.kind in ("glyph", "shape", "text"):
            x, y = item.center
            out[-1, min(grid - 1, int(y // patch)), min(grid - 1, int(x // patch))] = 1
    return out


def extents(scene: Scene, grid: int) -> np.ndarray:
    """int16 [grid, grid]: the size class (from 1, see EXTENTS) of the glyph or shape that a patch shows, else 0."""
    out = np.zeros((grid, grid), np.int16)
    for item in scene.objects:
        if item.kind in ("glyph", "shape"):
            rows, columns, share = patch_cover(item, scene.size, grid)
            step = sum(item.extent * 224 >= limit * scene.size for limit in EXTENTS)
            out[rows, columns][share > VISIBLE] = step
    return out


def bag(scene: Scene) -> np.ndarray:
    """float32 [len(CLASSES) + len(COLORS)]: 1 for every class and colour in the picture, clutter included."""
    out = np.zeros(len(CLASSES) + len(COLOR_NAMES), np.float32)
    for item in scene.objects:
        out[_CLASS_ID[item.name]] = 1
        if item.color:
            out[len(CLASSES) + _COLOR_ID[item.color] - 1] = 1
    return out


@dataclass(frozen=True)
class Alignment:
    """Tables from dense targets to the words that name them (-1: none)."""

    class_word: Tensor
    color_word: Tensor
    rank_word: Tensor

    @classmethod
    def make(cls) -> Alignment:
        def table(names: tuple[str, ...]) -> Tensor:
            return torch.tensor([TOKEN_ID.get(name, -1) for name in names])

        return cls(table(CLASSES), table(("", *COLOR_NAMES)), table(RANKS))

    def words(self, targets: Tensor) -> Tensor:
        """Token ids [B, N, 5] that name what each patch shows, from dense targets [B, rows, N]; -1 for none."""
        kind, color, tens, ones, rank = targets[:, :5].long().unbind(1)
        first = torch.where(tens > 0, TOKEN_ID["0"] + tens - 1, -1)
        second = torch.where(ones > 0, TOKEN_ID["##0"] + ones - 1, -1)
        return torch.stack([self.class_word[kind], self.color_word[color], first, second, self.rank_word[rank]], -1)
