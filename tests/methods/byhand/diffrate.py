"""Patches ranked by [CLS] in every block of the tower, the last pruned, others merged upwards: tile by tile."""

from __future__ import annotations

from math import log

import torch
from byhand import Entry, Hand, Reference, share, top
from torch import Tensor
from torch.nn.functional import normalize
from towerhand import Tile, in_tower

SETTINGS = {"prune": ("90%", "70%", 12, "40%"), "merge": ("90%", "50%", 10, "30%")}
BUILDS = ("llava_clip", "llava_next")  # those with [CLS]


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    prune: tuple[int | str, ...],
    merge: tuple[int | str, ...],
) -> Hand:
    weights: dict[int, list[float]] = {}

    def act(point: str, tile: Tile) -> None:
        block = int(point[len("blocks[") :].partition("]")[0])
        if point.endswith(".mlp") and block < len(prune):
            pruned, merged = (min(len(tile.ids) - 1, share(own[block], 25)) for own in (prune, merge))
            if merged < len(tile.ids) - 1:
                weights[id(tile)] = reduced(tile, weights.get(id(tile), [1.0] * len(tile.ids)), pruned, merged)

    return in_tower(act)(reference, sample, entry)


def reduced(tile: Tile, weight: list[float], pruned: int, merged: int) -> list[float]:
    """Reduce a tile; what each of its tokens weighs from now on."""
    row = tile.from_first.mean(0)
    order = [0, *sorted(range(1, len(row)), key=lambda j: -float(row[j]))]
    assert sorted(order[: 1 + pruned])[1:] == (top(row[1:], pruned) + 1).tolist()
    unit = normalize(tile.x, dim=-1)
    kept, gone = order[: 1 + merged], order[1 + merged : 1 + pruned]
    members = {i: [i] for i in kept}
    weighs = {i: weight[i] for i in kept}
    for j in gone:
        target = max(kept[1:], key=lambda i: float(unit[i] @ unit[j]))
        members[target].append(j)
        weighs[target] += weight[j] * float(unit[target] @ unit[j])
    tile.take(kept, torch.stack([tile.x[own].mean(0) for own in members.values()]))
    tile.bias = torch.tensor([log(w) for w in weighs.values()])
    return list(weighs.values())
