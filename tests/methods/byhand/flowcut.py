"""A running score of what flows to [CLS]; every second block cuts by it, as far as the entropy of its look asks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor
from towerhand import Tile, projected, tiles_of

from methods.byhand import feature_block

SETTINGS = {"keep": 9}
BUILDS = ("llava_clip", "llava_next")  # those with [CLS]


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int) -> Hand:
    blocks, cuts = reference.model.model.vision_tower.encoder.layers, feature_block(reference)
    seen: dict[int, tuple[list[float], list[float]]] = {}  # of each tile, what its last block showed
    running: dict[int, list[float]] = {}

    def act(point: str, tile: Tile) -> None:
        if point.endswith("mlp"):
            return
        block = int(point[7:-1])
        if 0 < block <= cuts:
            _behind(tile, seen[id(tile)], running, cuts - block, keep)
        seen[id(tile)] = _shown(blocks[block], tile.x)

    embeds, kept = entry.embeds.clone(), []
    for picture, tiles in enumerate(tiles_of(reference, sample, act)):
        cells, score = entry.cells[picture].tolist(), {}
        for number, tile in enumerate(tiles):
            for row, token in enumerate(tile.ids[1:]):
                cell = number * reference.cells + token - 1
                if cell in cells:
                    score[cells.index(cell)] = running[id(tile)][row]
                    embeds[0, entry.content[picture][cells.index(cell)]] = projected(reference, tile.x[1 + row])
        ids = torch.tensor(sorted(score))
        kept.append(ids[top(torch.tensor([score[int(i)] for i in ids]), share(keep, len(cells)))])
    return Hand(replace(entry, embeds=embeds), {0: keeping(entry, kept)})


@torch.no_grad()
def _shown(block: torch.nn.Module, x: Tensor) -> tuple[list[float], list[float]]:
    """Attention of [CLS] to each patch, and the score of each patch."""
    own, u = block.self_attn, block.layer_norm1(x)
    q, k, v = (f(u).unflatten(-1, (own.num_heads, -1)) for f in (own.q_proj, own.k_proj, own.v_proj))
    attended = torch.stack([(q[0, h] @ k[:, h].T * own.scale).softmax(0) for h in range(own.num_heads)]).mean(0)[1:]
    alike = torch.stack([(v[0, h] @ v[:, h].T).softmax(0) for h in range(own.num_heads)]).mean(0)[1:]
    score = (attended / attended.sum() + alike / alike.sum()) * v.mean(1).abs().sum(-1)[1:]
    return attended.tolist(), score.tolist()


def _behind(
    tile: Tile, shown: tuple[list[float], list[float]], running: dict[int, list[float]], left: int, keep: int
) -> None:
    attended, score = shown
    old = running.get(id(tile))
    now = score if old is None else [(a + b) / 2 for a, b in zip(old, score, strict=True)]
    if left % 2 == 0:
        n, parts = len(now), [a / sum(attended) for a in attended]
        even = -sum(p * math.log(p) for p in parts) / math.log(n)
        count = keep if left == 0 else max(keep, n - round((n - keep) / left**0.5 * (1 - even**2)))
        rows = top(torch.tensor(now), min(n, count)).tolist()
        tile.take([0, *(1 + row for row in rows)])
        now = [now[row] for row in rows]
    running[id(tile)] = now
