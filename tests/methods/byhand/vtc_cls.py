"""[CLS] attention summed over the blocks from half of the depth to the feature block."""

from __future__ import annotations

from byhand import Entry, Hand, Reference, keeping, share
from torch import Tensor

from methods.byhand import feature_block, per_tile, tiles_of

SETTINGS = {"keep": "40%"}
BUILDS = ("llava_clip", "llava_next")  # those with [CLS]


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    vision = reference.vision(sample)
    last = feature_block(reference)
    kept = []
    for picture, cells in enumerate(entry.cells):
        blocks = range(min(len(vision.cls) // 2, last), last + 1)
        total = sum(vision.cls[block][picture].mean(0)[cells] for block in blocks)
        kept.append(per_tile(tiles_of(reference, entry, picture), total, share(keep, len(cells))))
    return Hand(entry, {0: keeping(entry, kept)})
