"""The first layer whose router, two matrices with GELU between, prefers that the sample's pictures leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Cut, Entry, Hand, Reference, Seen, cut
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import glorot

SETTINGS = {"weights": "untrained", "hidden": 24}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, hidden: int, weights: str) -> Hand:
    depth, width = len(reference.lm.layers), entry.embeds.shape[-1]
    shapes = [shape for _ in range(1, depth) for shape in ((hidden, 2 * width), (2, hidden))]
    matrices = glorot(shapes)
    cuts: dict[int, Cut] = {}
    for layer in range(1, depth):
        first, second = matrices[2 * layer - 2 : 2 * layer]

        def choose(number: int, rows: Tensor, seen: Sequence[Seen], first=first, second=second) -> Tensor:
            now = seen[-1]
            text = now.hidden[0, now.held > entry.items[-1][-1]]
            said = second @ gelu(first @ torch.cat([text[:-1].mean(0), text[-1]]))
            return rows[:0] if said[1] > said[0] else rows

        cuts[layer] = cut(entry, choose)
    return Hand(entry, cuts)
