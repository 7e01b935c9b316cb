"""Cut where neighbours differ more than the neighbours around; a segment is the mean of its tokens."""

from __future__ import annotations

from itertools import pairwise

from byhand import Entry, Hand, Reference
from torch import Tensor

from methods.byhand.runs import cosine, merging

SETTINGS = {"least": 0.3}
BUILDS = ("qwen2_audio", "llava_clip", "llava_next")


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, least: float) -> Hand:
    return Hand(entry, {0: merging(entry, lambda x: segments(x, least))})


def segments(x: Tensor, least: float = 0.0) -> list[list[int]]:
    """The segments of one item."""
    change = [1 - cosine(a, b) for a, b in pairwise(x)]
    found: list[list[int]] = [[0]]
    for t, value in enumerate(change):
        before, behind = change[t - 1] if t else -1, change[t + 1] if t + 1 < len(change) else -1
        if value > before and value >= behind and value > least:
            found.append([])
        found[-1].append(t + 1)
    return found
