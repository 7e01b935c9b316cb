"""The first frame, and of all later tokens those that are least like their place in the frame before."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor

from methods.byhand import frames_of

SETTINGS = {"keep": "40%"}
BUILDS = ("qwen2_5_vl", "llava_next_video")
# A picture is one frame, of which a part stays that is even.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    kept = []
    for picture, content in enumerate(entry.content):
        x = entry.embeds[0, content].double()
        _, places = frames_of(sample, entry, picture)
        change = [10 - j * 0.6180339887498949 % 1 for j in range(places)]
        for j in range(places, len(x)):
            change.append(1 - float(torch.cosine_similarity(x[j], x[j - places], dim=0)))
        kept.append(top(torch.tensor(change, dtype=torch.float64), share(keep, len(x), "down")))
    return Hand(entry, {0: keeping(entry, kept)})
