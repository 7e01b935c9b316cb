"""Frames that are new have many tokens, frames that repeat the last keyframe few: means over parts of their grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import zoo
from byhand import Entry, Hand, Reference, Seen, share
from torch import Tensor

from methods.byhand import dealt, frames_of

SETTINGS = {"keep": "30%", "tau": 0.7, "longest": 3, "ratio": 6.0, "sampling": False}
BUILDS = ("qwen2_5_vl", "llava_next_video")
# A picture is one frame, whose tokens are condensed.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def sides_of(sample: dict[str, Tensor], entry: Entry, number: int, places: int) -> tuple[int, int]:
    """Rows and columns of a frame."""
    kinds = [int(sample["input_ids"][0, content[0]]) == zoo.VIDEO for content in entry.content]
    name = "video_grid_thw" if kinds[number] else "image_grid_thw"
    if name not in sample:
        return int(places**0.5), int(places**0.5)
    _, h, w = (sample[name][kinds[:number].count(kinds[number])] // 2).tolist()
    return h, w


def alike(a: Tensor, b: Tensor, h: int, w: int) -> float:
    """The mean cosine of two frames over 4 × 4 regions, or as many as there are rows and columns."""
    found: dict[tuple[int, int], list[int]] = {}
    for place in range(h * w):
        r, c = divmod(place, w)
        found.setdefault((r * min(4, h) // h, c * min(4, w) // w), []).append(place)
    cosines = [float(torch.cosine_similarity(a[own].sum(0), b[own].sum(0), dim=0)) for own in found.values()]
    return sum(cosines) / len(cosines)


def parts(count: int, h: int, w: int) -> list[list[int]]:
    """Bands of rows, and runs of columns in each."""
    bands = min(max(min(round((count * h / w) ** 0.5), h), -(-count // w)), count)
    bands, found = max(bands, 1), []
    for band in range(bands):
        rows = [r for r in range(h) if r * bands // h == band]
        columns = count // bands + (band < count % bands)
        found += [[r * w + c for r in rows for c in range(w) if c * columns // w == i] for i in range(columns)]
    return found


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: str,
    tau: float,
    longest: int,
    ratio: float,
    **_: bool,
) -> Hand:
    def merge(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            frames, places = frames_of(sample, entry, number)
            h, w = sides_of(sample, entry, number, places)
            x = now.hidden[0, content].unflatten(0, (frames, places))
            keys, repeats = [0], [-1.0]
            for t in range(1, frames):
                repeats.append(alike(x[t].double(), x[keys[-1]].double(), h, w))
                if repeats[-1] < tau or t - keys[-1] >= longest:
                    keys.append(t)
            least = min([tau, *repeats[1:]])
            weights = [
                ratio if t in keys else 1 + (ratio - 1) * min(1, max(0, (1 - repeats[t]) / (1 - least)))
                for t in range(frames)
            ]
            stay[content] = False
            for t, count in enumerate(dealt(share(keep, frames * places), weights, [places] * frames)):
                for own in parts(count, h, w) if count else ():
                    at = int(content[t * places + own[0]])
                    hidden[0, at] = x[t, own].mean(0)
                    stay[at] = True
        return Seen(hidden[:, stay], now.held[stay])

    return Hand(entry, {0: merge})
