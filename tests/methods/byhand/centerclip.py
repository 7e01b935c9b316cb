"""The medoids of segments of a few frames, from the longest token on."""

from __future__ import annotations

import torch
import zoo
from byhand import Entry, Hand, Reference, keeping, share
from torch import Tensor

from methods.byhand import frames_of, shares

SETTINGS = {"keep": "40%", "segments": 3}
BUILDS = (*zoo.BUILDS, "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: str, segments: int) -> Hand:
    kept = []
    for number, content in enumerate(entry.content):
        frames = frames_of(sample, entry, number)[0]
        x = entry.embeds[0, content]
        count = min(segments, frames)
        sizes = [part * (len(x) // frames) for part in shares(frames, [frames] * count)]
        own, start = [], 0
        for size, k in zip(sizes, shares(share(keep, len(x)), sizes), strict=True):
            own += [start + i for i in medoids(x[start : start + size], k)]
            start += size
        kept.append(torch.tensor(own))
    return Hand(entry, {0: keeping(entry, kept)})


def medoids(x: Tensor, k: int) -> list[int]:
    every = range(len(x))
    far = [[float((x[i] - x[j]).norm()) for j in every] for i in every]
    chosen = [max(every, key=lambda i: float(x[i].norm()))]
    while len(chosen) < k:
        rest = [i for i in every if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(far[i][c] for c in chosen)))
    while True:
        owner = [i if i in chosen else min(chosen, key=lambda c, i=i: far[i][c]) for i in every]
        groups = [[i for i in every if owner[i] == c] for c in chosen]
        moved = [min(own, key=lambda i, own=own: sum(far[i][j] for j in own)) for own in groups]
        if moved == chosen:
            return sorted(chosen)
        chosen = moved
