"""Blocks as loops over frames, rows and columns; queries that read everything behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from methods.byhand import frames_of, glorot
from methods.byhand.qtsplus import waves
from methods.byhand.question import question_rows

SETTINGS = {"frames": 3, "side": 2, "queries": 3, "weights": "untrained"}
BUILDS = ("llava_clip", "qwen2_5_vl", "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
TRAINED = 32  # queries of the module, of which the first are used


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    frames: int,
    side: int,
    queries: int,
    weights: str,
) -> Hand:
    width = entry.embeds.shape[-1]
    shapes = [(width, width)] * 8  # of the local branch, which its gates leave out
    shapes += [(width, width), (2 * width, width), (width, width), (2 * width, width), (width, width), (width, width)]
    shapes += [(TRAINED, width), (width, width)]
    matrices = glorot(shapes)[8:]
    g = question_rows(reference, sample, entry).mean(0)
    embeds, held = entry.embeds, entry.held
    for picture, item in enumerate(entry.items):
        x = entry.embeds[0, entry.content[picture]]
        t, places = frames_of(sample, entry, picture)
        h, w = sides(reference, sample, places)
        own, middles = [], []
        for block in blocks((t, h, w), (frames if t > 1 else 1, side, side)):
            rows = torch.tensor(block)
            share = (x[rows] @ g / width**0.5).softmax(0)
            own.append(share @ x[rows])
            middles.append(block[len(block) // 2])
        others = [i for i in range(len(x)) if i not in middles]
        count = min(queries, len(others))
        where = sum(waves([p[axis] for p in spots((t, h, w))], width) for axis in range(3))
        made = torch.cat([torch.stack(own), read(x, where, g, matrices)[:count]])
        at = middles + [others[i * len(others) // count] for i in range(count)]
        before, after = held < item[0], held > item[-1]
        embeds = torch.cat([embeds[:, before], made[None], embeds[:, after]], 1)
        held = torch.cat([held[before], entry.content[picture][torch.tensor(at)], held[after]])
    return Hand(replace(entry, embeds=embeds, held=held))


def read(x: Tensor, where: Tensor, g: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    down, guide_down, guide_up, kv, out, q, queries, up = matrices
    width = x.shape[1]
    scale, shift = (gelu(g @ guide_up.T) @ guide_down.T).chunk(2)
    asked = layer_norm(queries * (1 + scale) + shift, (width,))
    keys, values = ((layer_norm(x, (width,)) + where) @ kv.T).chunk(2, -1)
    share = (asked @ q.T @ keys.T / width**0.5).softmax(-1)
    return gelu((asked + share @ values @ out.T) @ up.T) @ down.T


def sides(reference: Reference, sample: dict[str, Tensor], places: int) -> tuple[int, int]:
    if reference.tile:
        side = round(places**0.5)
        return side, side
    grids = [g for name in ("video_grid_thw", "image_grid_thw") if name in sample for g in sample[name].tolist()]
    return next((g[1] // 2, g[2] // 2) for g in grids if g[1] * g[2] // 4 == places)


def spots(shape: Sequence[int]) -> list[tuple[int, int, int]]:
    t, h, w = shape
    return [(f, r, c) for f in range(t) for r in range(h) for c in range(w)]


def starts(length: int, side: int) -> list[int]:
    count = -(-length // side)
    if count == 1:
        return [0]
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def blocks(shape: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    t, h, w = shape
    found = []
    for f in starts(t, sizes[0]):
        for r in starts(h, sizes[1]):
            for c in starts(w, sizes[2]):
                found.append(
                    [
                        (i * h + j) * w + k
                        for i in range(f, min(t, f + sizes[0]))
                        for j in range(r, min(h, r + sizes[1]))
                        for k in range(c, min(w, c + sizes[2]))
                    ]
                )
    return found
