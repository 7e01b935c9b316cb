"""LLaVA-OneVision: a picture and its mosaic of tiles, shrunk where tiles are many; videos pooled; no [CLS].

Tokens of a shrunk mosaic and of a pooled frame are mixtures of up to four patches, made behind the projector. Signals
are mixed in the same way, by the model's own code, and no single patch can leave before the projector. Several
pictures in one row of a batch (`batch_num_images`) are not tiled.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.core.layout import CONTENT, Layout, grid_rows, separators
from winnow.models.family import Encoding
from winnow.models.llava_next import NEWLINE, LlavaNext
from winnow.models.towers import patch_size, starts, unfolded


class LlavaOnevision(LlavaNext):
    name = "llava_onevision"
    model_types = ("llava_onevision",)
    streams = False
    short = False
    encoders = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "video_token_id"),
    )
    points = ("projected", "layers")

    def tile_counts(self, model: Any, encoding: Encoding, tiles: int) -> tuple[int, ...]:
        counts = super().tile_counts(model, encoding, tiles)
        together = encoding.inputs.get("batch_num_images")
        if together is None:
            return counts
        alone = [n == 1 for n in torch.as_tensor(together).tolist() for _ in range(n)]
        return tuple(count if tiled else 1 for count, tiled in zip(counts, alone, strict=True))

    def tiles(self, model: Any, encoding: Encoding) -> Tensor:
        if encoding.modality == "video":
            return encoding.inputs["pixel_values_videos"].flatten(0, 1)
        return super().tiles(model, encoding)

    def lm_layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        if encoding.modality == "video":
            frames, side = encoding.inputs["pixel_values_videos"].shape[1], -(-self.side(model) // 2)
            return (_video(side, frames),) * len(encoding.lengths)
        counts = self.tile_counts(model, encoding, 0)
        pairs = zip(self.sizes(encoding), counts, strict=True)
        return tuple(self.picture(model, encoding, size, tiles) for size, tiles in pairs)

    def picture(self, model: Any, encoding: Encoding, size: tuple[int, int], tiles: int) -> Layout:
        """The layout of one picture, read off the model's own packing of a map of the mosaic's rows and columns."""
        side, mosaic = self.side(model), self.mosaic(model, size, tiles)
        row, col = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
        places = np.stack([row, col], -1).reshape(-1, 2).astype(np.float64)
        corners = [(0, 0), *((r * side, c * side) for r in range(mosaic[0]) for c in range(mosaic[1]))][:tiles]
        index = torch.from_numpy(np.stack([places + corner for corner in corners]))
        newline = torch.full((2,), float(NEWLINE), dtype=torch.float64)
        packed = self.pack(model, encoding, [index], [size], newline)
        return _picture(tuple(map(tuple, packed[side**2 :].tolist())), side, mosaic, tiles)

    def pack(
        self, model: Any, encoding: Encoding, rows: list[Tensor], sizes: Sequence[tuple[int, int]], newline: Tensor
    ) -> Tensor:
        """`[pictures][tiles, N, C]` → `[tokens, C]` as the model packs its pictures."""
        ratio = encoding.inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        packed, _ = model.base_model.pack_image_features(
            rows, torch.tensor(sizes), image_newline=newline, vision_aspect_ratio=ratio
        )
        return torch.cat(packed)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        rows = torch.cat(list(values))
        flat = rows.reshape(*rows.shape[:2], -1)
        if encoding.modality == "video":
            mixed = model.base_model.apply_pooling(flat).flatten(0, 1)
        else:
            pictures = list(flat.split(self.tile_counts(model, encoding, 0)))
            packed = self.pack(model, encoding, pictures, self.sizes(encoding), flat.new_zeros(flat.shape[-1]))
            kinds = np.concatenate([layout.kind for layout in self.lm_layouts(model, encoding)])
            mixed = packed[torch.from_numpy(kinds == CONTENT).to(packed.device)]
        return mixed.reshape(-1, *rows.shape[2:])

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        return self.cells(model, encoding, [unfolded(self.tiles(model, encoding), patch_size(model))])

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return starts(layout.n_content for layout in self.lm_layouts(model, encoding))


@functools.lru_cache(maxsize=256)
def _picture(places: tuple[tuple[float, float], ...], side: int, mosaic: tuple[int, int], tiles: int) -> Layout:
    """The whole picture, then the mosaic; a token of it belongs to the tile in which its centre lies."""
    whole = grid_rows(side, side)
    at = np.asarray(places).reshape(-1, 2)
    if tiles == 1:
        return Layout.of(("llava_onevision", side, 1, len(at)), [whole, separators(len(at))])
    content = at[at[:, 0] != NEWLINE]
    rows = len(at) - len(content)
    if len(content) == 0:
        return Layout.of(("llava_onevision", side, mosaic, rows, 0), [whole, separators(rows)])
    cols = len(content) // rows
    down, across = ((content + 0.5) // side).astype(np.int64).T
    crop = grid_rows(
        rows,
        cols,
        grid=1,
        tile=1 + down * mosaic[1] + across,
        cell=np.arange(side**2, side**2 + len(content)),
        newline=True,
    )
    first, last = content[0].round(6).tolist(), content[-1].round(6).tolist()
    return Layout.of(("llava_onevision", side, mosaic, rows, cols, *first, *last), [whole, crop])


@functools.lru_cache(maxsize=64)
def _video(side: int, frames: int) -> Layout:
    return Layout.of(("llava_onevision_video", side, frames), [grid_rows(side, side, frames), separators(1)])
