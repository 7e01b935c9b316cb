"""Local tokens by windows, global ones for the rest, all others merged into them; cut again in the LM's middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, Seen, cut, keeping, share, top
from torch import Tensor

from methods.byhand import cosines, feature_block, grid_of, shares, tiles_of

SETTINGS = {"keep": 11, "last": 5, "layer": 2, "shallow": 0, "window": 2}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: int | str,
    last: int | str,
    layer: int,
    shallow: int,
    window: int,
) -> Hand:
    vision = reference.vision(sample)
    source, embeds, kept = vision.cls or vision.received, entry.embeds.clone(), []
    for picture, cells in enumerate(entry.cells):
        near, deep = (source[b][picture].mean(0)[cells].tolist() for b in (shallow, feature_block(reference)))
        grid = grid_of(reference, sample, picture)
        rows = entry.embeds[0, entry.content[picture]]
        alike = cosines(rows)
        tiles = [tile.tolist() for tile in tiles_of(reference, entry, picture)]
        own: list[int] = []
        quotas = shares(share(keep, len(cells), "down"), [len(t) for t in tiles])
        for tile, quota in zip(tiles, quotas, strict=True):
            chosen = _scan(tile, quota, near, deep, [grid(int(cells[i])) for i in tile], window)
            groups: dict[int, list[int]] = {c: [c] for c in chosen}
            for i in tile:
                if i not in groups and chosen:
                    groups[max(chosen, key=lambda c: alike[i][c])].append(i)
            for c, members in groups.items():
                embeds[0, entry.content[picture][c]] = rows[members].mean(0)
            own += chosen
        kept.append(torch.tensor(sorted(own)))

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        score = reference.lm_attention(layer, seen[-1], entry)[:, -1].mean(0)
        return rows[top(score[rows], share(last, len(entry.content[number]), "down"))]

    return Hand(replace(entry, embeds=embeds), {0: keeping(entry, kept), layer: cut(entry, choose)})


def _scan(
    tile: list[int], quota: int, near: list[float], deep: list[float], spots: list[tuple[int, int]], side: int
) -> list[int]:
    top_row, left = min(r for r, _ in spots), min(c for _, c in spots)
    down = max(1, (max(r for r, _ in spots) - top_row + 1) // side)
    across = max(1, (max(c for _, c in spots) - left + 1) // side)
    window = {
        i: (min((r - top_row) // side, down - 1), min((c - left) // side, across - 1))
        for i, (r, c) in zip(tile, spots, strict=True)
    }
    local = quota // 2
    most, taken = -(-local // len(set(window.values()))), []
    for i in sorted(tile, key=lambda i: -near[i]):
        if len(taken) < local and sum(window[j] == window[i] for j in taken) < most:
            taken.append(i)
    rest = sorted((i for i in tile if i not in taken), key=lambda i: -deep[i])
    return sorted(taken + rest[: quota - len(taken)])
