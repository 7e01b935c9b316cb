"""Greedy max-sum from the token that [CLS] of the last block sees most; `tau`: all or none before 7/8 of the LM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor

from methods.byhand import cosines, greedily, tiles_of

SETTINGS = {"keep": 9, "tau": 0.5}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: int | str,
    tau: float | None = None,
    criterion: str = "sum",
    seed: int = 0,
) -> Hand:
    vision = reference.vision(sample)

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        if vision.cls:
            score = vision.cls[-1][number].mean(0)[entry.cells[number]]
            first = int(top(score[tiles_of(reference, entry, number)[0]], 1))
        else:
            first = int(top(torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)), 1))
        tally = {"sum": sum, "max": max}[criterion]
        picks = greedily(cosines(seen[-1].hidden[0, rows]), first, share(keep, len(rows)), tally)
        return rows[torch.tensor(sorted(picks))]

    cuts = {0: cut(entry, choose)}
    if tau is not None:
        layer = max(1, len(reference.lm.layers) * 7 // 8)

        def forget(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            weights = reference.lm_attention(layer - 1, seen[layer - 1], entry).mean(0)
            held = seen[layer - 1].held
            pictures = torch.isin(held, torch.cat(entry.content))
            question = held > entry.items[-1][-1]
            towards = float(weights[question][:, pictures].sum(1).mean())
            back = float(weights[pictures][:, question].sum(1).mean())
            return rows[:0] if towards < tau and back < tau else rows

        cuts[layer] = cut(entry, forget)
    return Hand(entry, cuts)
