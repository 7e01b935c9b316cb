"""What the last prompt token attends to in layer K − 1, cut before layer K."""

from __future__ import annotations

from collections.abc import Sequence

from byhand import Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor

SETTINGS = {"keep": "50%", "layer": 2}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: int | str,
    layer: int = 2,
    compact: bool = False,
) -> Hand:

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        score = reference.lm_attention(layer - 1, seen[layer - 1], entry, compact)[:, -1].mean(0)
        return rows[top(score[rows], share(keep, len(entry.content[number]), "even"))]

    return Hand(entry, {layer: cut(entry, choose)})
