"""Greedy max–min of cosine distance; the start is the token whose nearest neighbour is farthest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut, share
from torch import Tensor

from methods.byhand import cosines, greedily

SETTINGS = {"keep": "40%"}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        alike = cosines(seen[-1].hidden[0, rows])
        nearest = [max(a for j, a in enumerate(row) if j != i) for i, row in enumerate(alike)]
        picks = greedily(alike, nearest.index(min(nearest)), share(keep, len(rows)), max)
        return rows[torch.tensor(sorted(picks))]

    return Hand(entry, {0: cut(entry, choose)})
