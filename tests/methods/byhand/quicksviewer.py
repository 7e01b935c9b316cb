"""Cubes begin where the smoothed change scores best; all queries read each, behind the mean of their first frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import frames_of, glorot
from methods.byhand.covipal import normed
from methods.byhand.kffocus import sides_of

SETTINGS = {"frames": 2, "queries": 3, "pool": 2, "weights": "untrained"}
BUILDS = ("qwen2_5_vl", "llava_next_video")
# A picture is one cube, and has no thumbnail.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def matrices(width: int, queries: int) -> list[Tensor]:
    square = (width, width)
    return glorot(
        [square, (2, width), square, square, square, square, square, square, (queries, width), square, square]
    )


def borders(x: Tensor, count: int, hidden: Tensor, out: Tensor, token: Tensor) -> list[int]:
    """The first frames of cubes."""
    change = [x[1] - x[0]]
    for t in range(2, len(x)):
        change.append(0.8 * (x[t] - x[t - 1]) + 0.2 * change[-1])
    scores = []
    for m in change:
        mean = torch.stack([token @ one for one in m]).mean(0)
        z = out @ gelu(hidden @ normed(mean))
        scores.append(float((z[1] - z[0]).sigmoid()))
    return sorted([0, *sorted(range(1, len(x)), key=lambda t: (-scores[t - 1], t))[:count]])


def sines(t: int, row: int, column: int, width: int) -> Tensor:
    parts = []
    for value, size in ((t, width // 8), (row, 3 * width // 16), (column, width // 2 - width // 8 - 3 * width // 16)):
        angles = torch.tensor([value / 10_000 ** (i / size) for i in range(size)])
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts)


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    frames: int,
    queries: int,
    pool: int,
    weights: str,
) -> Hand:
    width = entry.embeds.shape[-1]
    hidden, out, token, given, key, mixed, last, query, latents, small, value = matrices(width, queries)

    def read(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        rows, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            t, p = frames_of(sample, entry, number)
            _, w = sides_of(sample, entry, number, p)
            x = now.hidden[0, content].unflatten(0, (t, p))
            thumbs = 0 if t == 1 else max(1, p // pool)
            starts = [0] if t == 1 else borders(x, max(round(t / frames) - 1, 1), hidden, out, token)
            made = {}
            for i in range(thumbs):
                own = [place for place in range(p) if place * thumbs // p == i]
                made[i] = small @ torch.stack([x[s, place] for s in starts for place in own]).mean(0)
            free = min(queries, p - thumbs)
            cells = [thumbs + round(i * (p - thumbs - 1) / max(1, free - 1)) for i in range(free)]
            for start, end in zip(starts, [*starts[1:], t], strict=True):
                places = [(f, place) for f in range(start, end) for place in range(p)]
                table = torch.stack([normed(given @ x[f, place]) for f, place in places])
                where = torch.stack([sines(f, *divmod(place, w), width) for f, place in places])
                for cell, latent in zip(cells, latents, strict=False):
                    q = query @ normed(latent)
                    attention = ((table + where) @ key.T @ q / width**0.5).softmax(0)
                    made[start * p + cell] = last @ normed(mixed @ (attention @ (table @ value.T)))
            stay[content] = False
            for slot, vector in made.items():
                stay[content[slot]] = True
                rows[0, content[slot]] = vector
        return Seen(rows[:, stay], now.held[stay])

    return Hand(entry, {0: read})
