"""What the last prompt token is about to attend to in the layer behind each cut; shares of the entry, cut down."""

from __future__ import annotations

from collections.abc import Sequence

from byhand import Choice, Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor

SETTINGS = {"ratios": ("50%", "25%", "12.5%"), "layers": (1, 2, 3)}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    ratios: Sequence[int | str],
    layers: Sequence[int],
    compact: bool = False,
) -> Hand:

    def at(layer: int, keep: int | str) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            score = reference.lm_attention(layer, seen[-1], entry, compact)[:, -1].mean(0)
            return rows[top(score[rows], share(keep, len(entry.content[number]), "down"))]

        return choose

    return Hand(entry, {layer: cut(entry, at(layer, keep)) for layer, keep in zip(layers, ratios, strict=True)})
