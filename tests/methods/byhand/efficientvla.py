"""Key tokens by the text's look, half of the rest by the same, and half by being unlike the key tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, cut, share
from torch import Tensor

from methods.byhand import cosines

SETTINGS = {"keep": 9, "key": 3, "alpha": 0.4, "layer": 2}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: int | str,
    key: int,
    alpha: float,
    layer: int,
) -> Hand:
    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        was = seen[layer - 1]
        weights = reference.lm_attention(layer - 1, was, entry).mean(0)
        looks = weights[was.held > entry.items[-1][-1]].sum(0).tolist()
        k = share(keep, len(entry.content[number]))
        ranked = sorted(rows.tolist(), key=lambda i: -looks[i])
        alike = cosines(seen[-1].hidden[0])
        keys = ranked[: min(key, k)]
        chosen = ranked[: len(keys) + int(alpha * (k - len(keys)))]
        rest = sorted((i for i in rows.tolist() if i not in chosen), key=lambda i: max(alike[i][j] for j in keys))
        return torch.tensor(sorted(chosen + rest[: k - len(chosen)]))

    return Hand(entry, {layer: cut(entry, choose)})
