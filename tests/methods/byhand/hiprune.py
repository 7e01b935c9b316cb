"""Anchors of a middle block, their neighbours on the grid, and the rest by the feature block."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor

from methods.byhand import feature_block, grid_of, shares, tiles_of

SETTINGS = {"keep": 12, "alpha": 0.9, "object_layer": 1}
# Pictures with as many tokens and other neighbours, and frames, over whose edges nothing is a neighbour.
TURNED = ("3 B 6", "3 T 6", "2 T 1 B 4")
EXTRA = {"llava_next": (TURNED,), "qwen2_5_vl": (TURNED, ("3 V 6", "9", "2 V 4"))}


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, alpha: float, object_layer: int
) -> Hand:
    vision = reference.vision(sample)
    kept = []
    for picture, cells in enumerate(entry.cells):
        middle = vision.received[object_layer][picture].mean(0)[cells]
        deep = vision.received[feature_block(reference)][picture].mean(0)[cells]
        tiles = tiles_of(reference, entry, picture)
        grid = grid_of(reference, sample, picture)
        chosen: list[Tensor] = []
        for tile, quota in zip(tiles, shares(share(keep, len(cells)), [len(t) for t in tiles]), strict=True):
            anchors = tile[top(middle[tile], min(round(quota * alpha / 5), quota // 5))]
            spots = {grid(int(cells[i])): int(i) for i in tile}
            near = {int(a) for a in anchors}
            for row, col in [grid(int(cells[a])) for a in anchors]:
                around = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
                near |= {spots[spot] for spot in around if spot in spots}
            rest = torch.tensor([i for i in tile.tolist() if i not in near], dtype=torch.int64)
            chosen.append(torch.tensor(sorted(near), dtype=torch.int64))
            chosen.append(rest[top(deep[rest], quota - len(near))])
        kept.append(torch.cat(chosen).sort().values)
    return Hand(entry, {0: keeping(entry, kept)})
