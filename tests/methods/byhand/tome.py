"""Tokens merged in every block of the tower: in loops over tokens, tile by tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from byhand import Entry, Hand, Reference
from torch import Tensor
from torch.nn.functional import normalize
from towerhand import Tile, in_tower

SETTINGS = {"r": 3}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, r: int) -> Hand:
    return in_tower(merging(r))(reference, sample, entry)


def merging(r: int, proportional: bool = True) -> Callable[[str, Tile], None]:
    """In every block: each even token looks for the odd one that is most like it; the r best pairs become one."""

    def act(point: str, tile: Tile) -> None:
        n = len(tile.ids)
        pairs = min(r, (n - tile.prefix) // 2)
        if not point.endswith(".mlp") or pairs <= 0:
            return
        key, odd = normalize(tile.keys, dim=-1), range(1, n, 2)
        even = [a for a in range(0, n, 2) if a >= tile.prefix]
        best = {a: max(odd, key=lambda b, a=a: float(key[a] @ key[b])) for a in even}
        merged = sorted(best, key=lambda a: -float(key[a] @ key[best[a]]))[:pairs]
        size = [float(len(group)) for group in tile.groups]
        into = {b: [b, *(a for a in merged if best[a] == b)] for b in odd}
        stay = [[a] for a in range(0, n, 2) if a not in merged]
        order = stay + [into[b] for b in odd]
        rows = [sum(tile.x[i] * size[i] for i in own) / sum(size[i] for i in own) for own in order]
        groups = [set().union(*(tile.groups[i] for i in own)) for own in order]
        tile.take([own[0] for own in order], torch.stack(rows))
        tile.groups = groups
        if proportional:
            tile.bias = torch.tensor([len(group) for group in groups]).log()

    return act
