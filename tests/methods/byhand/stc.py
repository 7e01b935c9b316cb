"""Of each frame, the tokens that are least like its mean and the mean of all frames so far."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor
from torch.nn.functional import normalize

from methods.byhand import frames_of, shares

SETTINGS = {"keep": "40%"}
BUILDS = ("llava_clip", "llava_next", "qwen2_5_vl", "llava_next_video")
# Frames of a clip that a method cannot tell from one another are tried elsewhere: these have a cut.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    kept = []
    for picture, content in enumerate(entry.content):
        x, (frames, _) = entry.embeds[0, content].double(), frames_of(sample, entry, picture)
        clip, past, chosen = x.unflatten(0, (frames, -1)), [], []
        size = clip.shape[1]
        quota = shares(share(keep, len(x)), [size] * frames)
        for t, frame in enumerate(clip):
            past.append(frame.mean(0))
            steady = sorted(range(x.shape[1]), key=lambda c: float(frame[:, c].var(unbiased=False)))[: x.shape[1] // 2]
            unit = normalize(frame[:, steady], dim=-1)
            memory = normalize(torch.stack(past).mean(0)[steady], dim=0)
            chosen.append(top(-like(unit, unit.mean(0)) - like(unit, memory), quota[t]) + t * size)
        kept.append(torch.cat(chosen))
    return Hand(entry, {0: keeping(entry, kept)})


def like(x: Tensor, centre: Tensor) -> Tensor:
    distance = (x - centre).square().sum(-1)
    return sum(torch.exp(-distance / (2 * 2.0**power)) for power in range(-3, 2))  # type: ignore[return-value]
