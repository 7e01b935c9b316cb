"""Every three tokens in a row as their mean; what is left over as its own."""

from __future__ import annotations

from byhand import Entry, Hand, Reference
from torch import Tensor

from methods.byhand.runs import merging

SETTINGS = {"k": 3}
BUILDS = ("qwen2_audio", "llava_clip", "llava_next")


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, k: int) -> Hand:
    def windows(x: Tensor) -> list[list[int]]:
        return [list(range(start, min(start + k, len(x)))) for start in range(0, len(x), k)]

    return Hand(entry, {0: merging(entry, windows)})
