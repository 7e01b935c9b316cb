"""Neighbours become pairs from the most alike on, round by round, and a run is the mean of its tokens."""

from __future__ import annotations

from itertools import pairwise

from byhand import Entry, Hand, Reference, share
from torch import Tensor

from methods.byhand.runs import cosine, merging

SETTINGS = {"keep": "30%"}
BUILDS = ("qwen2_audio", "llava_clip", "llava_next")


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    return Hand(entry, {0: merging(entry, lambda x: joined(x, share(keep, len(x))))})


def joined(x: Tensor, keep: int) -> list[list[int]]:
    """The runs of one item."""
    runs = [[i] for i in range(len(x))]
    while len(runs) > keep:
        rows = [x[run].mean(0) for run in runs]
        likeness = [cosine(a, b) for a, b in pairwise(rows)]
        first: list[int] = []
        for t in sorted(range(len(likeness)), key=lambda t: -likeness[t]):
            if len(first) < min(len(runs) - keep, (len(runs) + 1) // 3) and all(abs(t - u) > 1 for u in first):
                first.append(t)
        behind = {t + 1 for t in first}
        runs = [run + runs[t + 1] if t in first else run for t, run in enumerate(runs) if t not in behind]
    return runs
