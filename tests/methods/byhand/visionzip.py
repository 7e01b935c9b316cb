"""Dominant tokens, and leftovers merged by the likeness of their keys, before the projector; newlines go."""

from __future__ import annotations

from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, share, top
from torch import Tensor
from torch.nn.functional import normalize

from methods.byhand import feature_block, grid_of, shares

SETTINGS = {"keep": 14, "contextual": 0.3}
BUILDS = ("llava_clip", "llava_next")  # those with [CLS]


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, contextual: float
) -> Hand:
    vision = reference.vision(sample)
    block = feature_block(reference)
    embeds, held = entry.embeds, entry.held
    for picture, item in enumerate(entry.items):
        score = vision.cls[block][picture].mean(0).unflatten(0, (-1, reference.cells))
        features, keys = vision.features[picture], vision.keys[block][picture]
        parts = shares(share(keep, len(entry.cells[picture])), [reference.cells + 1] * len(features))
        cls, dominant, merged = [], [], []
        for tile, part in enumerate(parts):
            c = min(max(0, part - 1), int(part * contextual + 0.5))
            picked = (top(score[tile], part - c - 1) + 1).tolist()
            rest = [i for i in range(1, reference.cells + 1) if i not in picked]
            cls.append((tile, features[tile, 0], None))
            dominant += [(tile, features[tile, i], tile * reference.cells + i - 1) for i in picked]
            merged += _merged(features[tile], normalize(keys[tile], dim=-1), rest, c, tile * reference.cells)
        grid = grid_of(reference, sample, picture)
        thumbnail = [d for d in dominant if d[0] == 0]
        mosaic = sorted((d for d in dominant if d[0] > 0), key=lambda d: grid(d[2]))
        ordered = [cls[0], *thumbnail, *mosaic, *cls[1:], *merged]
        rows = reference.model.model.multi_modal_projector(torch.stack([row for _, row, _ in ordered])[None])
        cells = entry.cells[picture].tolist()
        ids = torch.tensor([cells.index(cell) if cell in cells else 0 for _, _, cell in ordered])
        before, after = held < item[0], held > item[-1]
        embeds = torch.cat([embeds[:, before], rows, embeds[:, after]], 1)
        held = torch.cat([held[before], entry.content[picture][ids], held[after]])
    return Hand(replace(entry, embeds=embeds, held=held))


def _merged(features: Tensor, keys: Tensor, rest: list[int], c: int, start: int) -> list[tuple[int, Tensor, int]]:
    """Evenly spaced leftovers, each with the mean of those that are most like it added."""
    if c == 0:
        return []
    step = max(1, len(rest) // c)
    targets = [rest[k * step] for k in range(c)]
    members: dict[int, list[Tensor]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            alike = [float(keys[i] @ keys[t]) for t in targets]
            members[targets[alike.index(max(alike))]].append(features[i])
    return [(0, features[t] + (torch.stack(own).mean(0) if own else 0), start + t - 1) for t, own in members.items()]
