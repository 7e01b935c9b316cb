"""The most attended patches of each tile, and of the others what is left when the most alike are dropped, 8 a time."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference, keeping, share
from torch import Tensor

from methods.byhand import cosines, feature_block, shares, tiles_of

SETTINGS = {"keep": 9, "important": 0.4}
EXTRA = {"llava_next": (("3 B 6", "3 T 6", "2 T 1 B 4"),)}


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, important: float
) -> Hand:
    vision = reference.vision(sample)
    kept = []
    for picture, cells in enumerate(entry.cells):
        score = (vision.cls or vision.received)[feature_block(reference)][picture].mean(0)[cells].tolist()
        if vision.features:  # else four patches make a token, and tokens are compared as they enter the LM
            tower = vision.features[picture]
            rows = tower[:, tower.shape[1] - reference.cells :].flatten(0, 1)[cells]
        else:
            rows = entry.embeds[0, entry.content[picture]]
        tiles = tiles_of(reference, entry, picture)
        own: list[int] = []
        for tile, k in zip(tiles, shares(share(keep, len(cells)), [len(t) for t in tiles]), strict=True):
            alike, best = cosines(rows[tile]), sorted(range(len(tile)), key=lambda j: -score[tile[j]])
            first = int(k * important)
            own += [int(tile[j]) for j in best[:first] + _distinct(alike, best[first:], k - first)]
        kept.append(torch.tensor(sorted(own), dtype=torch.int64))
    return Hand(entry, {0: keeping(entry, kept)})


def _distinct(alike: list[list[float]], left: list[int], count: int) -> list[int]:
    if not count:
        return []
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        worst = sorted(even, key=lambda i: -max(alike[i][j] for j in odd))
        left = worst[min(8, len(left) - count) :] + odd
    return left
