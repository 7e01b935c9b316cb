"""Of every three frames two are made smaller, by weights between neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen
from torch import Tensor

from methods.byhand import frames_of
from methods.byhand.kffocus import sides_of

SETTINGS = {"strides": (1.0, 2.0, 1.5), "window": None}
BUILDS = ("qwen2_5_vl", "llava_next_video")
# A picture stays as it is.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def between(n: int, m: int) -> list[dict[int, float]]:
    """For each of m points, the places on a line of n that it lies between, and what they weigh."""
    found = []
    for i in range(m):
        at = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
        low = int(at)
        found.append({low: 1 - (at - low)} | ({low + 1: at - low} if at > low else {}))
    return found


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, strides: Sequence[float], window: None
) -> Hand:
    def pool(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            frames, places = frames_of(sample, entry, number)
            if frames == 1:
                continue
            h, w = sides_of(sample, entry, number, places)
            x = now.hidden[0, content].unflatten(0, (frames, places))
            stay[content] = False
            for t in range(frames):
                stride = strides[t % len(strides)]
                down, across = (between(n, max(1, int(n / stride + 0.5))) for n in (h, w))
                for rows in down:
                    for columns in across:
                        shares = {r * w + c: a * b for r, a in rows.items() for c, b in columns.items()}
                        nearest = max(rows, key=lambda r: rows[r]) * w + max(columns, key=lambda c: columns[c])
                        at = int(content[t * places + nearest])
                        hidden[0, at] = sum(share * x[t, place] for place, share in shares.items())
                        stay[at] = True
        return Seen(hidden[:, stay], now.held[stay])

    return Hand(entry, {0: pool})
