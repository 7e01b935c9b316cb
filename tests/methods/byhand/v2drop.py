"""What the layer before a cut has changed most; shares of the entry, cut down."""

from __future__ import annotations

from collections.abc import Sequence

from byhand import Choice, Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor

SETTINGS = {"ratios": ("60%", "30%", 2), "layers": (1, 2, 3)}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    ratios: Sequence[int | str],
    layers: Sequence[int],
) -> Hand:

    def at(layer: int, keep: int | str) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            changed = [float((a - b).norm()) for a, b in zip(seen[-1].hidden[0], seen[-2].hidden[0], strict=True)]
            score = Tensor([changed[row] for row in rows])
            return rows[top(score, min(len(rows), share(keep, len(entry.content[number]), "down")))]

        return choose

    return Hand(entry, {layer: cut(entry, at(layer, keep)) for layer, keep in zip(layers, ratios, strict=True)})
