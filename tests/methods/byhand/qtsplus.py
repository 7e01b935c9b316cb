"""Attention of the question written out, a share for each item, and what is kept attends to itself once more."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, keeping, top
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import frames_of, glorot
from methods.byhand.question import question_rows

SETTINGS = {"least": 0.2, "most": 0.9, "weights": "untrained"}
BUILDS = ("llava_clip", "llava_next", "qwen2_5_vl", "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
HIDDEN = 256


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, least: float, most: float, weights: str
) -> Hand:
    width, heads = entry.embeds.shape[-1], reference.lm.config.num_attention_heads
    inner = width // heads * heads
    shapes = ((width, 4 * width), (width, inner), (3 * inner, width), (4 * width, width), (inner, width))
    down, out, qkv, up, k, q, last, first = glorot((*shapes, (inner, width), (1, HIDDEN), (HIDDEN, width + 3)))
    question, embeds, kept = question_rows(reference, sample, entry), entry.embeds.clone(), []
    for picture, content in enumerate(entry.content):
        x = embeds[0, content]
        n = len(x)
        asked, shown = normed(question) @ q.T, normed(x) @ k.T
        r = torch.stack([shares_of(asked, shown, at) for at in torch.arange(inner).chunk(heads)]).amax((0, 1))
        p = r / r.sum()
        known = torch.tensor([math.log(n), float(r.max()), -float((p * p.log()).sum())])
        logit = gelu(torch.cat([question.mean(0), known]) @ first.T) @ last[0]
        count = max(1, math.ceil(float((least + (most - least) * logit.sigmoid()) * n)))
        own = top(r, min(n, count))
        frames, places = frames_of(sample, entry, picture)
        time = waves([int(j) // places if frames > 1 else 0 for j in own], width)
        y = x[own]
        parts = (normed(y) + time) @ qkv.T
        mixed = []
        for at in torch.arange(inner).chunk(heads):
            v = parts[:, 2 * inner + at]
            mixed.append(shares_of(parts[:, at], parts[:, inner + at], torch.arange(len(at))) @ v)
        y = y + torch.cat(mixed, -1) @ out.T
        embeds[0, content[own]] = y + gelu(normed(y) @ up.T) @ down.T
        kept.append(own)
    return Hand(replace(entry, embeds=embeds), {0: keeping(entry, kept)})


def normed(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def shares_of(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    return (q[:, at] @ k[:, at].T / len(at) ** 0.5).softmax(-1)


def waves(places: list[int], width: int) -> Tensor:
    half = width // 2
    angles = [[place / 10000 ** (i / half) for i in range(half)] for place in places]
    rows = [[*map(math.sin, row), *map(math.cos, row)] for row in angles]
    return torch.tensor(rows)
