"""Whole rows of each tile, by the attention that they receive in the feature block, mean over heads and queries."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor

from methods.byhand import feature_block, grid_of, tiles_of

SETTINGS = {"keep": "40%", "strategy": "row"}
EXTRA = {"qwen2_5_vl": (("3 V 6", "9", "2 V 4"),)}


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, strategy: str = "rank"
) -> Hand:
    vision = reference.vision(sample)
    kept = []
    for picture, cells in enumerate(entry.cells):
        score = vision.received[feature_block(reference)][picture].mean(0)[cells]
        if strategy == "rank":
            kept.append(top(score, share(keep, len(cells))))
            continue
        grid, chosen = grid_of(reference, sample, picture), []
        for tile in tiles_of(reference, entry, picture):
            rows: dict[int, list[int]] = defaultdict(list)
            for i in tile.tolist():
                rows[grid(int(cells[i]))[0]].append(i)
            sums = torch.stack([score[own].sum() for own in rows.values()])
            part = Fraction(keep.rstrip("%")) / 100 if isinstance(keep, str) else Fraction(keep, len(cells))
            best = top(sums, max(1, int(part * len(rows) + Fraction(1, 2))))
            chosen += [i for row in best.tolist() for i in list(rows.values())[row]]
        kept.append(torch.tensor(sorted(chosen), dtype=torch.int64))
    return Hand(entry, {0: keeping(entry, kept)})
