"""What adapters share whose tower and connector are known: their description, and tokens made of several patches.

Signals of these families have a row for each content token: where several patches make one token, it has their mean.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout, grid_rows
from winnow.models.family import Encoding, Family, feature_block, seam


class KnownTower(Family):
    """A family whose tower is found at fixed paths."""

    points: ClassVar[tuple[str, ...]] = ("projected", "layers")

    def info(self, model: Any) -> ModelInfo:
        config = model.config
        text = config.get_text_config()
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vision_width=config.vision_config.hidden_size,
            vision_depth=len(seam(model.base_model, self.blocks, model)),
            feature_layer=feature_block(self.feature_layer(model)),
            has_cls=self.has_cls(model),
            points=self.points,
            mrope=self.mrope,
            merge=self.merge(model),
        )

    def feature_layer(self, model: Any) -> int | Sequence[int]:
        """The hidden state, or those, that the connector is given."""
        return getattr(model.config, "vision_feature_layer", -1)

    def has_cls(self, model: Any) -> bool:
        embeddings = getattr(seam(model.base_model, self.tower, model), "embeddings", None)
        return hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")

    def merge(self, model: Any) -> int:
        """Patches of one side that make a token."""
        return 1

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return starts(layout.n_content for layout in self.layouts(model, encoding))


class MergedTiles(KnownTower):
    """Square tiles of which merge × merge patches make a token. No patch can leave before the connector."""

    def tiles(self, model: Any, encoding: Encoding) -> Tensor:
        """`[tiles, 3, H, W]` the pixels that the tower is given."""
        return encoding.inputs["pixel_values"]

    def side(self, model: Any, encoding: Encoding) -> int:
        """Tokens along one side of a tile."""
        return encoding.inputs["pixel_values"].shape[-1] // (patch_size(model) * self.merge(model))

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        side, parts = self.side(model, encoding), encoding.parts or (1,) * len(encoding.lengths)
        check_lengths(model, encoding, tuple(n * side**2 for n in parts))
        if encoding.modality == "video":
            return tuple(Layout.grid(side, side, n) for n in parts)
        return tuple(_tiles(side, n) for n in parts)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        side, rows = self.side(model, encoding), torch.cat(list(values))
        if rows.shape[1:3] == (side, side):  # a connector that gives a grid
            return rows.flatten(0, 2)
        if rows.shape[1] == side**2:
            return rows.flatten(0, 1)
        patches = side * self.merge(model)
        return merged(rows, patches, patches, self.merge(model)).flatten(0, 1)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        return unfolded(self.tiles(model, encoding), patch_size(model) * self.merge(model)).flatten(0, 1)


@functools.lru_cache(maxsize=256)
def _tiles(side: int, n: int) -> Layout:
    """A tile alone is its picture. Of several the last is the whole picture; where the others lie is not known."""
    if n == 1:
        return Layout.grid(side, side)
    cells = np.arange(side**2)
    parts = []
    for tile in range(1, n):
        part = grid_rows(side, side, grid=tile, tile=tile, cell=cells + (tile - 1) * side**2)
        parts.append({**part, "boxes": np.full((side**2, 4), np.nan)})
    parts.append(grid_rows(side, side, cell=cells + (n - 1) * side**2))
    return Layout.of(("tiles", side, n), parts)


def check_lengths(model: Any, encoding: Encoding, expected: tuple[int, ...]) -> None:
    """Refuse a model that made other numbers of tokens than its configuration says."""
    if expected != encoding.lengths:
        raise UnsupportedError(
            f"{type(model).__name__} made {encoding.lengths} tokens of its {encoding.modality} items; expected "
            f"{expected}. Check that pixels and sizes come from the processor of this model."
        )


def patch_size(model: Any) -> int:
    """Pixels along one side of a patch."""
    size = model.config.vision_config.patch_size
    return size if isinstance(size, int) else size[0]


def starts(counts: Iterable[int]) -> tuple[int, ...]:
    """Where each of several runs begins that stand one behind the other."""
    return tuple(itertools.accumulate(counts, initial=0))[:-1]


def merged(rows: Tensor, h: int, w: int, merge: int) -> Tensor:
    """`[grids, h · w, …]` → `[grids, h/merge · w/merge, …]`: means of squares; an incomplete square is left out."""
    down, across = h // merge, w // merge
    grid = rows.unflatten(1, (h, w))[:, : down * merge, : across * merge]
    return grid.unflatten(2, (across, merge)).unflatten(1, (down, merge)).mean((2, 4)).flatten(1, 2)


def unfolded(pixels: Tensor, size: int) -> Tensor:
    """`[tiles, C, H, W]` → `[tiles, squares, C · size²]` the pixels of each square."""
    return torch.nn.functional.unfold(pixels.float(), size, stride=size).transpose(1, 2)
