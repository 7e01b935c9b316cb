"""Nothing of a picture behind a layer."""

from __future__ import annotations

from byhand import Entry, Hand, Reference, cut
from torch import Tensor

SETTINGS = {"layer": 2}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, layer: int) -> Hand:
    return Hand(entry, {layer: cut(entry, lambda number, rows, seen: rows[:0])})
