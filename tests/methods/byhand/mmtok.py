"""The token that adds most to what covers the question and the picture; for tiles, in each by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut, share
from torch import Tensor
from torch.nn.functional import normalize

from methods.byhand import shares, tiles_of
from methods.byhand.question import question_rows, similarity

SETTINGS = {"keep": "30%"}
BUILDS = ("llava_clip", "llava_siglip", "llava_next")  # the patches of the tower are read by hand


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    question = question_rows(reference, sample, entry)
    vision = reference.vision(sample)

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        cosines = similarity(seen[-1].hidden[0, rows], question)
        patches = vision.features[number][:, -reference.cells :].flatten(0, 1)[entry.cells[number]]
        tiles, chosen = tiles_of(reference, entry, number), []
        for tile, quota in zip(tiles, shares(share(keep, len(rows)), [len(t) for t in tiles]), strict=True):
            x = normalize(patches[tile], dim=-1)
            words = (cosines[tile].T / 0.02).softmax(1) / len(question)
            picture = 0.5 * (x @ x.T / 0.2).softmax(1) / len(tile)
            table = torch.cat([words, picture]).T.double().tolist()  # for each token what it covers
            best, picks = [0.0] * len(table[0]), []
            while len(picks) < quota:
                gains = [sum(max(a - b, 0) for a, b in zip(row, best, strict=True)) for row in table]
                rest = [j for j in range(len(table)) if j not in picks]
                picks.append(max(rest, key=lambda j: gains[j]))
                best = [max(a, b) for a, b in zip(table[picks[-1]], best, strict=True)]
            chosen += [int(tile[j]) for j in picks]
        return rows[torch.tensor(sorted(chosen))]

    return Hand(entry, {0: cut(entry, choose)})
