"""Each chunk described word by word, and the states of the words beside the means of its frames."""

from __future__ import annotations

from dataclasses import replace

import torch
from byhand import Entry, Hand, Reference, keeping
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import frames_of, glorot
from methods.byhand.chunked import BUILDS, ROWS, Spot, chunks, layer, layer_shapes, normed, spots, spread, waves

__all__ = ["BUILDS", "ROWS", "SETTINGS", "by_hand"]

SETTINGS = {"most": 3, "every": 2, "weights": "untrained"}
W, HEADS, DEPTH, WORDS = 96, 4, 3, 66
STOP, START = 0, 1


def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, most: int, every: int, weights: str
) -> Hand:
    embeds, kept = entry.embeds.clone(), []
    for number, content in enumerate(entry.content):
        frames, own = frames_of(sample, entry, number)
        x = entry.embeds[0, content]
        where = [(f % every, r, c) for f, r, c in spots(reference, sample, entry, number)]
        rows: dict[int, Tensor] = {}
        for part in chunks(frames, own, every):
            middles = [first + own // 2 for first in part[::own]]
            rows |= {middle: x[middle - own // 2 :][:own].mean(0) for middle in middles}
            free = [i for i in part if i not in middles]
            said = described(x[list(part)], [where[i] for i in part], most)[: len(free)]
            rows |= {free[i]: row for i, row in zip(spread(len(free), len(said)), said, strict=True)}
        at = sorted(rows)
        embeds[0, content[at]] = torch.stack([rows[i] for i in at])
        kept.append(torch.tensor(at))
    return Hand(replace(entry, embeds=embeds), {0: keeping(entry, kept)})


def described(x: Tensor, where: list[Spot], most: int) -> Tensor:
    """The projected states of the words that are said of a chunk, on what each was chosen by."""
    d = x.shape[1]
    shapes = layer_shapes(W)
    down, enter, *rest = glorot([(d, 2 * W), (W, d), *shapes * DEPTH, (2 * W, W), (WORDS, W)])
    up, table = rest[-2:]
    layers = [rest[5 * k : 5 * k + 5] for k in range(DEPTH)]
    seen = torch.stack([normed(row) @ enter.T + waves(spot, W) for row, spot in zip(x, where, strict=True)])

    def states(words: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.cat([seen, torch.stack([table[w] + waves((i,), W) for i, w in enumerate(words)])])
        weights = x.new_zeros(0)
        for matrices in layers:
            rows, weights = layer(rows, matrices, HEADS, lambda i: list(range(max(i + 1, len(seen)))))
        share = weights[len(seen) :, : len(seen)]
        return normed(rows[len(seen) :]), share / share.sum(1, keepdim=True)

    words = [START]
    while len(words) <= most:
        logits = (table @ states(words)[0][-1]).tolist()
        best = max((w for w in range(WORDS) if w != START), key=lambda w: logits[w])
        if best == STOP:
            break
        words.append(best)
    own, share = states(words)
    return gelu(own[1:] @ up.T) @ down.T + share[:-1] @ x
