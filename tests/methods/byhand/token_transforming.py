"""All patches mixed into those that are kept, in some blocks of the tower: token by token, tile by tile."""

from __future__ import annotations

from math import exp, log

import torch
from byhand import Entry, Hand, Reference, share, top
from torch import Tensor
from torch.nn.functional import normalize
from towerhand import Tile, in_tower

SETTINGS = {"ratios": ("70%", "40%", "20%"), "blocks": (0, 1, 3), "tau": 0.3}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    ratios: tuple[str, ...],
    blocks: tuple[int, ...],
    tau: float,
) -> Hand:
    stages = {f"blocks[{block}].mlp": ratio for block, ratio in zip(blocks, ratios, strict=True)}
    masses: dict[int, list[float]] = {}
    sizes: dict[int, int] = {}

    def act(point: str, tile: Tile) -> None:
        patches = sizes.setdefault(id(tile), len(tile.ids) - tile.prefix)
        count = share(stages[point], patches) if point in stages else len(tile.ids)
        if tile.prefix + count < len(tile.ids):
            mass = masses.get(id(tile), [1.0] * len(tile.ids))
            masses[id(tile)] = mixed(tile, mass, count, tau)

    return in_tower(act)(reference, sample, entry)


def mixed(tile: Tile, mass: list[float], count: int, tau: float) -> list[float]:
    """Mix the tokens of a tile; the mass of each output."""
    rows = tile.from_first if tile.prefix else tile.received
    patches = [tile.prefix + i for i in top(rows.mean(0)[tile.prefix :], count).tolist()]
    key = normalize(tile.keys, dim=-1)
    alike = (key @ key.T).tolist()
    kept = list(range(tile.prefix)) + patches
    given = {i: {i: mass[i]} for i in kept}
    for j in range(len(tile.ids)):
        if j not in kept:
            weight = {i: exp(alike[i][j] / tau) for i in patches}
            for i in patches:
                given[i][j] = mass[j] * weight[i] / sum(weight.values())
    total = [sum(given[i].values()) for i in kept]
    weights = torch.tensor([[given[i].get(j, 0.0) for j in range(len(tile.ids))] for i in kept])
    mixture = torch.einsum("mn,n...->m...", weights, tile.x) / torch.tensor(total).reshape(-1, *[1] * (tile.x.ndim - 1))
    tile.take(kept, mixture)
    tile.bias = torch.tensor([log(t) for t in total])
    return total
