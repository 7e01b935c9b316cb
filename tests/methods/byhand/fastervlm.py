"""[CLS] attention of the feature block; where there is no [CLS], the mean over all queries."""

from __future__ import annotations

from byhand import Entry, Hand, Reference, keeping, share
from torch import Tensor

from methods.byhand import feature_block, per_tile, tiles_of

SETTINGS = {"keep": 10}


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, block: int | None = None
) -> Hand:
    vision = reference.vision(sample)
    block = feature_block(reference) if block is None else block
    kept = []
    for picture, cells in enumerate(entry.cells):
        score = (vision.cls or vision.received)[block][picture].mean(0)[cells]
        kept.append(per_tile(tiles_of(reference, entry, picture), score, share(keep, len(cells))))
    return Hand(entry, {0: keeping(entry, kept)})
