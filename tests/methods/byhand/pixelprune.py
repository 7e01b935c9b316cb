"""Cells of pixels that a scan does not predict enter the tower; the others do not."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference
from torch import Tensor
from towerhand import Tile, in_tower

# Random pixels: cells differ by a root mean square of about √2 of their deviation.
SETTINGS = {"threshold": 0.707, "metric": "rmse"}
EXTRA = {"qwen2_5_vl": (("3 V 6", "9", "2 V 4"),)}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, threshold: float, metric: str) -> Hand:
    assert metric == "rmse"
    kept = iter([_scanned(cells, threshold) for cells in _cells(reference, sample)])

    def act(point: str, tile: Tile) -> None:
        if point == "blocks[0]":
            tile.take([*range(tile.prefix), *(tile.prefix + i for i in next(kept))])

    return in_tower(act)(reference, sample, entry)


def _cells(reference: Reference, sample: dict[str, Tensor]) -> list[list[list[Tensor]]]:
    """For each tile, picture by picture, its rows of cells; a cell is all pixels of a token."""
    found = []
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if f"{kind}_grid_thw" in sample:
            patches = iter(sample[name] * 0.5)
            for t, h, w in sample[f"{kind}_grid_thw"].tolist():
                take = lambda: torch.cat([next(patches) for _ in range(4)])  # noqa: B023, E731
                found += [[[take() for _ in range(w // 2)] for _ in range(h // 2)] for _ in range(t)]
    if not found and "pixel_values" in sample:
        side, sizes = reference.model.config.vision_config.patch_size, sample.get("image_sizes")
        for number, picture in enumerate(sample["pixel_values"] * 0.5):
            tiles = picture[None] if sizes is None else picture[: reference._tiles(sizes[number])]
            for tile in tiles:
                rows = tile.split(side, 1)
                found.append([[cell.flatten() for cell in row.split(side, 2)] for row in rows])
    return found


def _scanned(cells: list[list[Tensor]], threshold: float) -> list[int]:
    def alike(a: Tensor, b: Tensor) -> bool:
        return float((a - b).square().mean().sqrt()) <= threshold

    stands, kept = [list(row) for row in cells], []
    for r, row in enumerate(cells):
        for c, cell in enumerate(row):
            left = stands[r][c - 1] if c else None
            above = stands[r - 1][c] if r else None
            guess = above if left is None else left
            if r and c and alike(stands[r - 1][c - 1], left) and not alike(stands[r - 1][c - 1], above):
                guess = above
            if guess is not None and alike(cell, guess):
                stands[r][c] = guess
            else:
                kept.append(r * len(row) + c)
    return kept
