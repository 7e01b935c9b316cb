"""A transformer layer written out, over the visual rows and the last 32 rows of the question, before each cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Choice, Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import glorot

SETTINGS = {"ratios": ("60%", "30%"), "layers": (0, 2), "weights": "untrained"}
DIM, HEADS = 32, 4  # half of the width of the LM in all builds


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    ratios: Sequence[int | str],
    layers: Sequence[int],
    weights: str,
) -> Hand:
    width = entry.embeds.shape[-1]
    shapes = ((DIM, 4 * DIM), (DIM, DIM), (3 * DIM, DIM), (4 * DIM, DIM), (1, DIM), (DIM, width), (DIM, width))
    matrices = glorot(shapes * len(layers))

    def at(place: int, keep: int | str) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            now = seen[-1]
            question = now.hidden[0, now.held > entry.items[-1][-1]][-32:]
            score = scores(now.hidden[0, rows], question, matrices[7 * place : 7 * place + 7])
            return rows[top(score, share(keep, len(entry.content[number]), "down"))]

        return choose

    return Hand(entry, {layer: cut(entry, at(i, ratios[i])) for i, layer in enumerate(layers)})


def normed(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def scores(v: Tensor, t: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    down, out, qkv, up, score, text, visual = matrices
    x = torch.cat([normed(v) @ visual.T, normed(t) @ text.T])
    q, k, u = (normed(x) @ qkv.T).split(DIM, -1)
    heads = [
        (q[:, at] @ k[:, at].T / (DIM // HEADS) ** 0.5).softmax(-1) @ u[:, at] for at in torch.arange(DIM).chunk(HEADS)
    ]
    x = x + torch.cat(heads, -1) @ out.T
    x = x + gelu(normed(x) @ up.T) @ down.T
    return (normed(x[: len(v)]) @ score.T)[:, 0]
