"""The next token is the one that makes the determinant of the chosen kernel largest; for tiles, in each by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut, share
from torch import Tensor
from torch.nn.functional import normalize

from methods.byhand import shares, tiles_of
from methods.byhand.question import question_rows, similarity

SETTINGS = {"keep": "30%"}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    question = question_rows(reference, sample, entry)

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        x = seen[-1].hidden[0, rows]
        score = similarity(x, question.mean(0, keepdim=True))[:, 0]
        relevance = ((score - score.min() + 1e-6) / (score.max() - score.min())).double()
        unit = normalize(x.double(), dim=-1)
        kernel = relevance[:, None] * (unit @ unit.T) * relevance
        tiles, chosen = tiles_of(reference, entry, number), []
        for tile, quota in zip(tiles, shares(share(keep, len(rows)), [len(t) for t in tiles]), strict=True):
            picks: list[int] = []
            while len(picks) < quota:
                rest = [int(j) for j in tile if int(j) not in picks]
                volume = [float(torch.linalg.slogdet(kernel[[*picks, j]][:, [*picks, j]])[1]) for j in rest]
                picks.append(rest[volume.index(max(volume))])
            chosen += picks
        return rows[torch.tensor(sorted(chosen))]

    return Hand(entry, {0: cut(entry, choose)})
