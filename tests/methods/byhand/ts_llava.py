"""Of the tokens of all frames in one row, those at equal distances, the first and the last among them."""

from __future__ import annotations

from fractions import Fraction

import torch
from byhand import Entry, Hand, Reference, keeping
from torch import Tensor

SETTINGS = {"keep": 7}
BUILDS = ("qwen2_5_vl", "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int) -> Hand:
    kept = []
    for content in entry.content:
        last, gaps = len(content) - 1, min(keep, len(content)) - 1
        kept.append(torch.tensor([round(Fraction(i * last, gaps)) for i in range(gaps + 1)]))
    return Hand(entry, {0: keeping(entry, kept)})
