"""Keys that many share, and outliers of two rows of attention, tile by tile."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference, keeping
from torch import Tensor

from methods.byhand import cosines, feature_block, tiles_of

SETTINGS = {"similar": 0.6, "partners": 0.1, "local_layer": 1}
BUILDS = ("llava_clip", "llava_siglip", "llava_next")


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    similar: float,
    partners: float,
    local_layer: int,
) -> Hand:
    vision = reference.vision(sample)
    rows, feature, kept = vision.cls or vision.received, feature_block(reference), []
    for picture, cells in enumerate(entry.cells):
        deep, middle = (rows[block][picture].mean(0)[cells].tolist() for block in (feature, local_layer))
        keys = vision.keys[feature][picture]
        keys = keys[:, keys.shape[1] - reference.cells :].flatten(0, 1)[cells]
        tiles = [tile.tolist() for tile in tiles_of(reference, entry, picture)]
        own: list[int] = []
        for number, tile in enumerate(tiles):
            alike = cosines(keys[tile])
            alone = [sum(s > similar for s in row) - 1 <= partners * len(tile) for row in alike]
            quota = len(tile) if number == 0 and len(tiles) > 1 else max(1, sum(alone))
            first = sorted(
                (i for i in tile if any(_beyond(row, tile, i) for row in (deep, middle))), key=lambda i: -deep[i]
            )
            rest = sorted((i for i in tile if i not in first), key=lambda i: -middle[i])
            own += (first + rest)[:quota]
        kept.append(torch.tensor(sorted(own), dtype=torch.int64))
    return Hand(entry, {0: keeping(entry, kept)})


def _beyond(row: list[float], tile: list[int], i: int) -> bool:
    values = torch.tensor([row[j] for j in tile])
    low, high = (float(values.quantile(q)) for q in (0.25, 0.75))
    return row[i] > high + 1.5 * (high - low)
