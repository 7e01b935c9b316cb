"""Convolutions written out, over what the question attends to in the first layer, laid out on the picture's grids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import glorot, grid_of

SETTINGS = {"keep": 9, "weights": "untrained"}
CHANNELS = 64


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, weights: str) -> Hand:
    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        now = seen[-1]
        weights = reference.lm_attention(0, now, entry)
        received = weights[:, now.held > entry.items[-1][-1]].mean(1)[:, rows]  # heads, tokens
        first, second, last = glorot(((CHANNELS, len(received), 3, 3), (CHANNELS, CHANNELS, 3, 3), (1, CHANNELS, 1, 1)))
        at = spots(reference, sample, entry, number)
        x = torch.log1p(received * len(rows)) / math.log(2)
        x = gelu(convolved(x, first, at))
        x = gelu(convolved(x, second, at))
        return rows[top((last[:, :, 0, 0] @ x)[0], share(keep, len(rows)))]

    return Hand(entry, {0: cut(entry, choose)})


def spots(reference: Reference, sample: dict[str, Tensor], entry: Entry, number: int) -> list[tuple[int, int, int]]:
    """Plane, row and column of each token."""
    where = grid_of(reference, sample, number)
    cells = entry.cells[number].tolist()
    if not reference.tile:
        _, height, width = (sample["image_grid_thw"][number] // 2).tolist()
        return [(cell // (height * width), *divmod(cell % (height * width), width)) for cell in cells]
    return [(min(cell // reference.cells, 1), *where(cell)) for cell in cells]


def convolved(x: Tensor, kernel: Tensor, at: Sequence[tuple[int, int, int]]) -> Tensor:
    """A 3 × 3 convolution, token by token; a neighbour beyond the edge of its plane is the nearest inside."""
    index = {spot: j for j, spot in enumerate(at)}
    ends = {p: [(min(v), max(v)) for v in zip(*(s[1:] for s in at if s[0] == p), strict=True)] for p, _, _ in at}
    out = []
    for plane, row, col in at:
        (top_row, low_row), (left, right) = ends[plane]
        total = torch.zeros(kernel.shape[0])
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                near = (plane, min(max(row + down, top_row), low_row), min(max(col + across, left), right))
                total += kernel[:, :, down + 1, across + 1] @ x[:, index[near]]
        out.append(total)
    return torch.stack(out, -1)
