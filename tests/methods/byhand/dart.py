"""Pivots by the norms of cached keys; each takes what is least like it, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut, share
from torch import Tensor
from transformers import DynamicCache

from methods.byhand import cosines

SETTINGS = {"keep": 11, "layer": 2}
PIVOTS = 4


@torch.no_grad()
def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, layer: int, norm: bool = False
) -> Hand:
    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        before, now = seen[layer - 1], seen[-1]
        cache = DynamicCache(config=reference.lm.config)
        positions = reference._at(entry, before.held, False)
        reference._layer(reference.lm.layers[layer - 1], before.hidden, positions, cache)
        norms = cache.layers[layer - 1].keys[0].abs().sum((0, 2)).tolist()
        text = (before.held > entry.items[-1][-1]).nonzero()[:, 0].tolist()
        image = rows.tolist()
        k = share(keep, len(entry.content[number]), "down")
        pivots = sorted(image, key=lambda i: -norms[i])[: min(PIVOTS, k)]
        turns = pivots + sorted(text, key=lambda i: -norms[i])[:PIVOTS]
        alike = cosines((reference.lm.norm(now.hidden) if norm else now.hidden)[0])
        kept = set(pivots)
        rest = k - len(pivots)
        for turn, pivot in enumerate(turns):
            count = rest // len(turns) + (turn < rest % len(turns))
            kept |= set(sorted((i for i in image if i not in kept), key=lambda i: alike[pivot][i])[:count])
        return torch.tensor(sorted(kept))

    return Hand(entry, {layer: cut(entry, choose)})
