"""Runs of neighbours, each as the mean of its tokens at the place of its middle one: what methods for sounds leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from byhand import Cut, Entry, Seen
from torch import Tensor

Runs = Callable[[Tensor], list[list[int]]]  # the rows of an item → its runs, in order


def merging(entry: Entry, runs: Runs) -> Cut:
    """The cut at the LM's door that makes one row of each run."""

    def merge(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for content in entry.content:
            stay[content] = False
            for run in runs(now.hidden[0, content]):
                middle = content[run[(len(run) - 1) // 2]]
                hidden[0, middle] = now.hidden[0, content[run]].mean(0)
                stay[middle] = True
        return Seen(hidden[:, stay], now.held[stay])

    return merge


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))
