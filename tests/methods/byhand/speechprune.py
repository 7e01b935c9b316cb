"""Half of what goes by its smoothed likeness to the likest word, the rest by the last row of attention in layer 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Cut, Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor

from methods.byhand.question import question_rows, similarity

SETTINGS = {"left": "40%", "window": 3}
BUILDS = ("qwen2_audio", "llava_clip", "llava_next")


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, left: int | str, window: int) -> Hand:
    question, entered = question_rows(reference, sample, entry), [len(content) for content in entry.content]

    def similar(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        best = similarity(seen[-1].hidden[0, rows], question).amax(1)
        half, keep = window // 2, share(left, len(rows))
        smooth = torch.stack([best[max(0, t - half) : t + half + 1].mean() for t in range(len(best))])
        return rows[top(smooth, keep + (len(rows) - keep) // 2)]

    def attended(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        weights = reference.lm_attention(0, seen[-1], entry)[:, -1].mean(0)
        return rows[top(weights[rows], share(left, entered[number]))]

    first, second = cut(entry, similar), cut(entry, attended)

    def both(seen: Sequence[Seen]) -> Seen:
        return second([*seen[:-1], first(seen)])

    chosen: Cut = both
    return Hand(entry, {0: chosen})
