"""LLaVA-NeXT: a thumbnail and a mosaic of tiles, unpadded, with a newline after each mosaic row."""

import functools
from typing import Any

import numpy as np
import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from winnow.core.errors import UnsupportedError
from winnow.core.layout import Layout, cls_token, grid_rows, separators
from winnow.models.family import Encoding
from winnow.models.llava import Llava

NEWLINE = -1


class LlavaNext(Llava):
    name = "llava_next"
    model_types = ("llava_next",)

    def sizes(self, encoding: Encoding) -> tuple[tuple[int, int], ...]:
        """Height and width of each picture, on the host."""
        sizes = encoding.inputs.get("image_sizes")
        if sizes is None:
            raise UnsupportedError("LLaVA-NeXT needs image_sizes beside pixel_values; the processor gives both.")
        return tuple((int(h), int(w)) for h, w in torch.as_tensor(sizes).tolist())

    def tile_counts(self, model: Any, encoding: Encoding, tiles: int) -> tuple[int, ...]:
        config = model.config
        return tuple(
            int(image_size_to_num_patches([h, w], config.image_grid_pinpoints, config.vision_config.image_size))
            for h, w in self.sizes(encoding)
        )

    def tiles(self, model: Any, encoding: Encoding) -> torch.Tensor:
        pixels = encoding.inputs["pixel_values"]
        if pixels.ndim == 4:
            return pixels
        counts = self.tile_counts(model, encoding, 0)  # the batch is padded to the largest number of tiles
        return torch.cat([own[:n] for own, n in zip(pixels, counts, strict=True)])

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        found = self.lm_layouts(model, encoding)
        if tuple(layout.n for layout in found) != encoding.lengths:
            raise UnsupportedError(
                f"{type(model).__name__} packed {encoding.lengths} tokens; expected {tuple(x.n for x in found)}."
            )
        return found

    def lm_layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        tiles = self.tile_counts(model, encoding, 0)
        return tuple(self.layout(model, size, t) for size, t in zip(self.sizes(encoding), tiles, strict=True))

    def entries(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layout.n_content for layout in self.lm_layouts(model, encoding))

    def tower_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        return tuple(
            _tower_layout(self.side(model), self.mosaic(model, size, tiles), tiles, self.info(model).has_cls)
            for size, tiles in zip(self.sizes(encoding), counts, strict=True)
        )

    def mosaic(self, model: Any, size: tuple[int, int], tiles: int) -> tuple[int, int]:
        """Rows and columns of tiles."""
        if tiles == 1:
            return (1, 1)
        config = model.config
        rows, cols = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return int(rows), int(cols)

    def layout(self, model: Any, size: tuple[int, int], tiles: int) -> Layout:
        """The layout of one picture, read off the model's own packing of an index map."""
        side = self.side(model)
        index = torch.arange(tiles * side * side, dtype=torch.float64).reshape(tiles, side * side, 1)
        (packed,), _ = model.base_model.pack_image_features(
            [index],
            torch.tensor([size]),
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            image_newline=torch.tensor([float(NEWLINE)], dtype=torch.float64),
        )
        return _layout(tuple(packed[:, 0].long().tolist()), side, self.mosaic(model, size, tiles), tiles)


@functools.lru_cache(maxsize=256)
def _layout(order: tuple[int, ...], side: int, mosaic: tuple[int, int], tiles: int) -> Layout:
    thumbnail = grid_rows(side, side, cell=np.arange(side * side))
    rest = np.asarray(order[side * side :])
    if tiles == 1:
        return Layout.of(("llava_next", side, 1), [thumbnail, separators(len(rest))])
    cells = rest[rest != NEWLINE]
    rows = int((rest == NEWLINE).sum())
    if len(cells) == 0:  # a strip: unpadding leaves no row or no column of the mosaic, and newlines at most
        return Layout.of(("llava_next", side, mosaic, rows, 0), [thumbnail, separators(rows)])
    cols = len(cells) // rows
    crop = grid_rows(rows, cols, grid=1, tile=cells // (side * side), cell=cells, newline=True)
    return Layout.of(("llava_next", side, mosaic, rows, cols, int(cells[0])), [thumbnail, crop])


@functools.lru_cache(maxsize=64)
def _tower_layout(side: int, mosaic: tuple[int, int], tiles: int, has_cls: bool) -> Layout:
    """Tile-major; `place` numbers mosaic patches over the whole mosaic, so that it can be read row by row."""
    cells = side * side
    parts = []
    for tile in range(tiles):
        if has_cls:
            parts.append(cls_token())
        part = grid_rows(side, side, tile=tile, cell=np.arange(cells) + tile * cells)
        if tile:
            row, col = divmod(tile - 1, mosaic[1])
            x0, y0 = col / mosaic[1], row / mosaic[0]
            box = (x0, y0, x0 + 1 / mosaic[1], y0 + 1 / mosaic[0])
            part = grid_rows(side, side, grid=1, tile=tile, cell=np.arange(cells) + tile * cells, box=box)
            part["place"] = part["place"] + np.array([0, 0, row * side, col * side])
        parts.append(part)
    return Layout.of(("llava_next_tower", side, mosaic, tiles, has_cls), parts)
