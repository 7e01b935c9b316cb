"""Logits of [CLS] in the last block, thumbnail and crops; what each may keep, and what it keeps."""

from __future__ import annotations

import math

import torch
from byhand import Entry, Hand, Reference, keeping, share, top
from torch import Tensor

from methods.byhand import dealt, grid_of, tiles_of

SETTINGS = {"keep": "30%", "temperature": 0.5}
BUILDS = ("llava_clip", "llava_next")  # those with [CLS]


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, temperature: float
) -> Hand:
    logits = _logits(reference, sample) if entry.cells else []
    kept, first = [], 0
    for picture, cells in enumerate(entry.cells):
        tiles = tiles_of(reference, entry, picture)
        own = torch.cat(logits[first : first + int(cells.max()) // reference.cells + 1])[cells]
        total = share(keep, len(cells))
        if len(tiles) == 1:
            kept.append(top(own, total))
        else:
            size = sample["image_sizes"][picture]
            down, across = (-(-int(side) // reference.tile) for side in size)
            seen = own[tiles[0]]
            ratios = _ratios(seen, down, across, total / len(cells), temperature)
            quota = dealt(total, [r * len(tile) for r, tile in zip(ratios, tiles, strict=True)], [*map(len, tiles)])
            where = [grid_of(reference, sample, picture)(int(cell)) for cell in cells[len(tiles[0]) :]]
            there = _there(seen, where)
            chosen = [top(seen, quota[0])]
            for tile, k in zip(tiles[1:], quota[1:], strict=True):
                wide = there[tile - len(seen)]
                chosen.append(tile[top(own[tile] / own[tile].norm() + wide / wide.norm(), k)])
            kept.append(torch.cat(chosen).sort().values)
        first += 1 if "image_sizes" not in sample else reference._tiles(sample["image_sizes"][picture])
    return Hand(entry, {0: keeping(entry, kept)})


def _logits(reference: Reference, sample: dict[str, Tensor]) -> list[Tensor]:
    """Of each tile, the mean over heads of the products of [CLS] with all patches in the last block."""
    base = reference.model.model
    attention = base.vision_tower.encoder.layers[-1].self_attn
    made: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: made.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        base.get_image_features(**{k: v for k, v in sample.items() if k in ("pixel_values", "image_sizes")})
    for hook in hooks:
        hook.remove()
    q, k = (made[name].unflatten(-1, (attention.num_heads, -1)) for name in ("q_proj", "k_proj"))
    return [
        torch.einsum("hd,nhd->hn", one[0], keys[1:]).mean(0) * attention.scale for one, keys in zip(q, k, strict=True)
    ]


def _ratios(seen: Tensor, down: int, across: int, share: float, temperature: float) -> list[float]:
    side = math.isqrt(len(seen))
    sums = [0.0] * (down * across)
    for i, value in enumerate(seen.tolist()):
        row, col = min(i // side // (side // down), down - 1), min(i % side // (side // across), across - 1)
        sums[row * across + col] += value
    powers = [math.exp((s - max(sums)) / temperature) for s in sums]
    p = [power / sum(powers) for power in powers]
    return [share] + [min(1.0, share * (1 + one - sum(p) / len(p))) for one in p]


def _there(seen: Tensor, where: list[tuple[int, int]]) -> Tensor:
    """The thumbnail's values at the middles of the mosaic's tokens, between those of the four tokens around."""
    side = math.isqrt(len(seen))
    top_row, left = min(r for r, _ in where), min(c for _, c in where)
    rows, cols = max(r for r, _ in where) - top_row + 1, max(c for _, c in where) - left + 1
    found = []
    for r, c in where:
        y, x = max(0.0, (r - top_row + 0.5) * side / rows - 0.5), max(0.0, (c - left + 0.5) * side / cols - 0.5)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, side - 1), min(x0 + 1, side - 1)
        upper = seen[y0 * side + x0] * (1 - x + x0) + seen[y0 * side + x1] * (x - x0)
        lower = seen[y1 * side + x0] * (1 - x + x0) + seen[y1 * side + x1] * (x - x0)
        found.append(upper * (1 - y + y0) + lower * (y - y0))
    return torch.stack(found)
