"""Queries that read each chunk, one after the other, and a layer over the queries of all chunks."""

from __future__ import annotations

from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, keeping
from torch import Tensor

from methods.byhand import frames_of, glorot
from methods.byhand.chunked import BUILDS, ROWS, Spot, chunks, layer, layer_shapes, normed, spots, spread, waves

__all__ = ["BUILDS", "ROWS", "SETTINGS", "by_hand"]

SETTINGS = {"queries": 3, "every": 2, "weights": "untrained"}
W, HEADS, MOST = 96, 4, 8


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, queries: int, every: int, weights: str
) -> Hand:
    embeds, kept = entry.embeds.clone(), []
    for number, content in enumerate(entry.content):
        frames, own = frames_of(sample, entry, number)
        parts = chunks(frames, own, every)
        x = entry.embeds[0, content]
        where = [(f % every, r, c) for f, r, c in spots(reference, sample, entry, number)]
        at = [part[i] for part in parts for i in spread(len(part), min(queries, len(part)))]
        embeds[0, content[at]] = read(x, where, parts, queries)
        kept.append(torch.tensor(at))
    return Hand(replace(entry, embeds=embeds), {0: keeping(entry, kept)})


def read(x: Tensor, where: list[Spot], parts: list[range], queries: int) -> Tensor:
    d = x.shape[1]
    cross, plain = layer_shapes(W, cross=True), layer_shapes(W)
    enter, *rest = glorot([(W, d), *cross, *cross, *plain, (d, W), (MOST, W)])
    first, second, joint = rest[:8], rest[8:16], rest[16:21]
    leave, own = rest[21:]
    found, seen = [], []
    for c, part in enumerate(parts):
        tokens = torch.stack([normed(x[i]) @ enter.T + waves(where[i], W) for i in part])
        q = own[: min(queries, len(part))]
        for matrices in (first, second):
            q, weights = layer(q, matrices, HEADS, lambda i: list(range(i + 1)), tokens)
        seen.append(weights @ x[list(part)])
        found += [row + waves((c,), W) for row in q]
    q, _ = layer(torch.stack(found), joint, HEADS, lambda i: list(range(len(found))))
    return torch.cat(seen) + normed(q) @ leave.T
