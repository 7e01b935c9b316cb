"""Likeness to the video and to the frame over steady channels; unlike frames keep more, and of them what is unlike."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor
from torch.nn.functional import normalize

from methods.byhand import dealt, frames_of

# Over 64 random channels frames are all alike; at this temperature they keep unequal numbers.
SETTINGS = {"keep": "30%", "temperature": 0.05}
BUILDS = ("qwen2_5_vl", "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, temperature: float
) -> Hand:
    kept = []
    for picture, content in enumerate(entry.content):
        x, (frames, _) = entry.embeds[0, content].double(), frames_of(sample, entry, picture)
        steady = sorted(range(x.shape[1]), key=lambda c: float(x[:, c].var(unbiased=False)))[: x.shape[1] // 2]
        clip = normalize(x[:, steady], dim=-1).unflatten(0, (frames, -1))
        to_video = like(clip, clip.mean((0, 1)))
        both = to_video + like(clip, clip.mean(1, keepdim=True))
        total, size = share(keep, len(x)), clip.shape[1]
        p = (-to_video.mean(1) / temperature).softmax(0).tolist()
        ratios = [min(1.0, float(str(keep).rstrip("%")) / 100 * (1 + one - 1 / frames)) for one in p]
        quota = dealt(total, [ratio * size for ratio in ratios], [size] * frames)
        kept.append(torch.cat([top(-both[t], quota[t]) + t * size for t in range(frames)]))
    return Hand(entry, {0: keeping(entry, kept)})


def like(x: Tensor, centre: Tensor) -> Tensor:
    distance = (x - centre).square().sum(-1)
    return sum(torch.exp(-distance / (2 * 2.0**power)) for power in range(-3, 2))  # type: ignore[return-value]
