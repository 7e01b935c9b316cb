"""Flat windows behind the first block become their means; behind LM layers goes what no word looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from byhand import Choice, Entry, Hand, Reference, Seen, cut, top
from torch import Tensor
from towerhand import Tile, attention, projected, tiles_of

from methods.byhand import cosines, feature_block

SETTINGS = {"flat": 0.1, "key": 0.2, "overall": 0.04, "individual": 0.05, "layers": (0, 2), "cache": False}
BUILDS = ("llava_clip", "llava_siglip", "llava_next")


def _merge(reference: Reference, at: str, tile: Tile, flat: float) -> None:
    """The windows of 3 × 3 in the upper left of 5 × 5: one, of rows and columns 0 to 2."""
    if at != "blocks[1]":
        return
    side = math.isqrt(reference.cells)
    for row in range(0, side - 2, 3):
        for col in range(0, side - 2, 3):
            cells = [tile.prefix + (row + r) * side + col + c for r in range(3) for c in range(3)]
            rows = [tile.ids.index(cell) for cell in cells]
            alike = cosines(tile.x[rows])
            if sum(alike[i][j] for i in range(9) for j in range(9) if i != j) / 72 >= flat:
                tile.x[rows[4]] = tile.x[rows].mean(0)
                gone = [r for r in rows if r != rows[4]]
                stay = [r for r in range(len(tile.ids)) if r not in gone]
                tile.x, tile.ids = tile.x[stay], [tile.ids[r] for r in stay]
                tile.groups = [tile.groups[r] for r in stay]


def _looks(reference: Reference, tile: Tile) -> Tensor:
    """What the tokens of a tile receive in the last block, from [CLS] or from all."""
    blocks = reference.model.model.vision_tower.encoder.layers
    if feature_block(reference) == len(blocks) - 1:
        return tile.received.mean(0)
    block, own = blocks[-1], blocks[-1].self_attn
    u = block.layer_norm1(tile.x)
    q, k, v = (f(u).unflatten(-1, (own.num_heads, -1)) for f in (own.q_proj, own.k_proj, own.v_proj))
    return attention(q, k, v, own.scale, None)[1][:, 0].mean(0)


@torch.no_grad()
def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    flat: float,
    key: float,
    overall: float,
    individual: float,
    layers: Sequence[int],
    cache: bool,
) -> Hand:
    embeds, left, keys = entry.embeds.clone(), [], []
    for picture, tiles in enumerate(tiles_of(reference, sample, lambda at, tile: _merge(reference, at, tile, flat))):
        cells = entry.cells[picture].tolist()
        own: list[int] = []
        protected: list[int] = []
        for number, tile in enumerate(tiles):
            looks, places = _looks(reference, tile), []
            for row, token in enumerate(tile.ids):
                cell = number * reference.cells + token - tile.prefix
                if token >= tile.prefix and cell in cells:
                    places.append((cells.index(cell), float(looks[row])))
                    embeds[0, entry.content[picture][places[-1][0]]] = projected(reference, tile.x[row])
            places.sort()
            best = top(torch.tensor([look for _, look in places]), math.ceil(key * len(places)))
            protected += [places[int(i)][0] for i in best]
            own += [place for place, _ in places]
        left.append(torch.tensor(sorted(own)))
        keys.append({int(entry.content[picture][i]) for i in protected})

    def behind(layer: int) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            was = seen[layer]
            weights = reference.lm_attention(layer, was, entry).mean(0)
            text = weights[was.held > entry.items[-1][-1]][:, rows]
            total, most = text.sum(0), text.amax(0)
            kept = (total >= overall * total.sum()) | (most >= individual)
            kept |= torch.tensor([int(was.held[r]) in keys[number] for r in rows])
            return rows[kept]

        return choose

    cuts = {0: cut(entry, lambda number, rows, seen: rows[left[number]])}
    return Hand(replace(entry, embeds=embeds), cuts | {layer + 1: cut(entry, behind(layer)) for layer in layers})
