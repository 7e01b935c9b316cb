"""Two small Q-Formers written out: rows that choose frames, their duplicates, and a few queries for each frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import frames_of, glorot
from methods.byhand.covipal import normed
from methods.byhand.kffocus import sides_of
from methods.byhand.question import question_rows
from methods.byhand.quicksviewer import sines

SETTINGS = {"cap": 8, "frames": 3, "queries": 5, "threshold": 0.9, "weights": "untrained"}
BUILDS = ("qwen2_5_vl", "llava_next_video")
# A picture is one frame.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
DIM, HEADS = 96, 4


def former(width: int, queries: int) -> list[tuple[int, int]]:
    """The shapes of one Q-Former: a layer that reads, one that does not, the queries, and what takes the text."""
    own = [(2 * DIM, DIM)[::-1], *[(DIM, DIM)] * 4, (2 * DIM, DIM)]
    return [(DIM, width), (DIM, DIM), (DIM, DIM), (DIM, width), *own, *own, (queries, DIM), (DIM, width)]


def attended(x: Tensor, to: Tensor, k: Tensor, out: Tensor, q: Tensor, v: Tensor) -> Tensor:
    found = []
    for head in torch.arange(DIM).chunk(HEADS):
        weights = ((x @ q[head].T) @ (to @ k[head].T).T / (DIM // HEADS) ** 0.5).softmax(1)
        found.append(weights @ (to @ v[head].T))
    return torch.cat(found, 1) @ out.T


def read(
    given: Tensor, text: Tensor, matrices: Sequence[Tensor], place: Tensor | float = 0.0, count: int | None = None
) -> Tensor:
    """`[q, DIM]` what the queries find."""
    queries, taken = matrices[16][:count], matrices[17]
    given, n = normed(given) + place, len(queries)
    x = torch.cat([queries, normed(text) @ taken.T])
    for layer in range(2):
        cross = matrices[:4] if layer == 0 else None
        down, k, out, q, v, up = matrices[4 + 6 * layer : 10 + 6 * layer]
        x = x + attended(normed(x), normed(x), k, out, q, v)
        if cross is not None:
            x = torch.cat([x[:n] + attended(normed(x[:n]), given, *cross), x[n:]])
        x = x + gelu(normed(x) @ up.T) @ down.T
    return normed(x[:n])


def once(rows: Tensor, threshold: float) -> list[Tensor]:
    """The means of rows and their duplicates."""
    groups: list[list[int]] = []
    for i in range(len(rows)):
        alike = [(float(torch.cosine_similarity(rows[i], rows[j], dim=0)) + 1) / 2 for j in range(i)]
        if alike and max(alike) > threshold:
            next(group for group in groups if alike.index(max(alike)) in group).append(i)
        else:
            groups.append([i])
    return [rows[group].mean(0) for group in groups]


def merged(x: Tensor, count: int) -> Tensor:
    """Tokens by halves, then the rest: each of the most alike even ones joins an odd one."""
    while len(x) > count:
        r = len(x) // 2 if len(x) // 2 > count else len(x) - count
        even, odd = x[::2], x[1::2]
        alike = torch.cosine_similarity(even[:, None], odd[None], dim=2)
        order = sorted(range(len(even)), key=lambda i: -float(alike[i].max()))
        groups = [[o] for o in odd]
        for i in order[:r]:
            groups[int(alike[i].argmax())].append(even[i])
        x = torch.stack([even[i] for i in order[r:]] + [torch.stack(group).mean(0) for group in groups])
    return x


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    cap: int,
    frames: int,
    queries: int,
    threshold: float,
    weights: str,
) -> Hand:
    width, text = entry.embeds.shape[-1], question_rows(reference, sample, entry)
    square = [(width, DIM), (width, DIM), (width, width)]
    matrices = glorot([*former(width, frames), *square, *former(width, queries)])
    chooser, (wanted, back, out), reader = matrices[:18], matrices[18:21], matrices[21:]

    def act(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            t, p = frames_of(sample, entry, number)
            x = now.hidden[0, content].unflatten(0, (t, p))
            _, w = sides_of(sample, entry, number, p)
            where = torch.stack([sines(0, *divmod(i, w), width) for i in range(p)])
            means = x.mean(1)
            rows = (read(means, text, chooser, count=t) @ wanted.T @ means.T / width**0.5 / 0.5).softmax(1)
            chosen = sorted(once(rows, threshold), key=lambda row: int(row.argmax()))
            count, last = max(1, min(cap // len(chosen), queries, p)), -1
            stay[content] = False
            for i, row in enumerate(chosen):
                last = max(last + 1, min(int(row.argmax()), t - len(chosen) + i))
                found = merged(read(torch.einsum("t,tpd->pd", row, x), text, reader, where), count) @ back.T @ out.T
                for j, token in enumerate(found):
                    at = content[last * p + round(j * (p - 1) / max(1, count - 1))]
                    hidden[0, at], stay[at] = token, True
        return Seen(hidden[:, stay], now.held[stay])

    return Hand(entry, {0: act})
