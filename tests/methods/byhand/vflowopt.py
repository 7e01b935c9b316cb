"""Rows of the globally attended patches; the lowest merged by cells at the LM's door; two cuts by the same score."""

from __future__ import annotations

from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, Seen, cut, top
from torch import Tensor

from methods.byhand import feature_block, grid_of

SETTINGS = {"before": 0.6, "middle": 0.7, "late": 0.5, "threshold": 1.2, "cell": 2.5}
BUILDS = ("llava_clip", "llava_next")


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    before: float,
    middle: float,
    late: float,
    threshold: float,
    cell: float,
) -> Hand:
    scores = _scores(reference, sample, entry, threshold)
    embeds, held = entry.embeds.clone(), entry.held
    for picture, content in enumerate(entry.content):
        cells = entry.cells[picture].tolist()
        grid = grid_of(reference, sample, picture)
        spots = [(c >= reference.cells, *grid(c)) for c in cells]
        start = [min((s[axis] for s in spots if s[0]), default=0) for axis in (1, 2)]
        squares = [(g, (r - g * start[0]) // cell, (c - g * start[1]) // cell) for g, r, c in spots]
        score = scores[picture].tolist()
        order = sorted(range(len(score)), key=lambda i: (score[i], -i))
        fewer = round(len(score) * (1 - before))
        groups: dict[tuple, list[int]] = {}
        gone = 0
        for i in order:
            if gone == fewer:
                break
            gone += squares[i] in groups
            groups.setdefault(squares[i], []).append(i)
        dropped = []
        rows = entry.embeds[0, content]
        for group in groups.values():
            weight = torch.tensor([score[i] for i in group])
            embeds[0, content[group[-1]]] = (weight[:, None] * rows[group]).sum(0) / weight.sum()
            dropped += group[:-1]
        held = held[~torch.isin(held, content[dropped])]

    def cutting(share: float):
        def choose(number: int, rows: Tensor, seen: list[Seen]) -> Tensor:
            score = scores[number][torch.isin(entry.content[number], seen[-1].held[rows])]
            return rows[top(score, max(1, len(rows) - round(len(rows) * (1 - share))))]

        return cut(entry, choose)

    depth = reference.lm.config.num_hidden_layers
    layers = {int(depth * 9 / 28): cutting(middle), int(depth * 18 / 28): cutting(late)}
    return Hand(replace(entry, embeds=embeds[:, held], held=held), layers)


def _scores(reference: Reference, sample: dict[str, Tensor], entry: Entry, threshold: float) -> list[Tensor]:
    """For each picture, the score of its content tokens."""
    if "pixel_values" not in sample:
        return []
    found: list[Tensor] = []
    attention = reference.eager.model.vision_tower.encoder.layers[feature_block(reference)].self_attn
    hook = attention.register_forward_hook(lambda m, a, out: found.append(out[1]))
    pictures = {k: v for k, v in sample.items() if k in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        reference.eager.model.get_image_features(**pictures, return_dict=True)
    hook.remove()
    rows = []
    for weights in found[0].mean(1):
        prefix = len(weights) - reference.cells
        received = weights.mean(0)[prefix:]
        above = [i for i, r in enumerate(received.tolist()) if r > threshold * float(received.mean())]
        above = above or [int(received.argmax())]
        rows.append(torch.stack([weights[i + prefix, prefix:] for i in above]).mean(0))
    sizes = sample.get("image_sizes")
    counts = [1] * len(rows) if sizes is None else [reference._tiles(size) for size in sizes]
    whole = [torch.cat(rows[sum(counts[:p]) : sum(counts[: p + 1])]) for p in range(len(counts))]
    return [score[cells] for score, cells in zip(whole, entry.cells, strict=True)]
