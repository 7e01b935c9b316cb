"""Means over every two frames, and text that reads all tokens head by head in two layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Read, Reference, Seen
from torch import Tensor

from methods.byhand import frames_of, glorot

SETTINGS = {"stride": 2, "least": 2, "layers": (1, 2), "gate": 0.8, "weights": "untrained"}
BUILDS = ("qwen2_5_vl", "llava_next_video")
# Five frames leave a window that is not full; a picture stays as it is, and is read as well.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
EXTRA = {"llava_next_video": (("3 X 6", "2 X 4 X 5"),)}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    stride: int,
    least: int,
    layers: Sequence[int],
    gate: float,
    weights: str,
) -> Hand:
    def fast(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            frames, places = frames_of(sample, entry, number)
            if frames == 1:
                continue
            stay[content] = False
            for start in range(0, frames, stride):
                window = [min(start + i, frames - 1) for i in range(stride)]
                middle = sorted(set(window))[(len(set(window)) - 1) // 2]
                for place in range(places):
                    rows = now.hidden[0, content[[t * places + place for t in window]]]
                    at = content[middle * places + place]
                    hidden[0, at], stay[at] = rows.mean(0), True
        return Seen(hidden[:, stay], now.held[stay])

    visual = torch.cat([torch.zeros(0, dtype=torch.int64), *entry.items])
    content = torch.cat([visual[:0], *entry.content])
    attention = reference.lm.layers[0].self_attn
    wide, narrow = (p.out_features for p in (attention.q_proj, attention.k_proj))
    width = entry.embeds.shape[-1]
    slow = normed(entry.embeds[0, content])
    matrices = glorot([(narrow, width), (narrow, width), (1, wide)] * len(layers))
    reads = {}
    for number, layer in enumerate(layers):
        keys, values, opening = matrices[3 * number : 3 * number + 3]

        def heads(
            o: Tensor, q: Tensor, held: Tensor | None, k: Tensor = keys, v: Tensor = values, opening: Tensor = opening
        ) -> Tensor:
            context = torch.cat([read(q[h], slow @ k.T, slow @ v.T, h, len(q)) for h in range(len(q))], -1)
            added = (o @ opening.T).tanh() * torch.tensor(gate).tanh() * context
            return added if held is None else added.masked_fill(torch.isin(held, visual)[:, None], 0)

        reads[layer] = Read(heads=heads)
    return Hand(entry, {0: fast}, reads if len(content) else {})


def normed(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def read(q: Tensor, keys: Tensor, values: Tensor, head: int, heads: int) -> Tensor:
    """What the queries of one head read: `[n, d]`; heads share keys in groups."""
    d = q.shape[-1]
    group = head * (keys.shape[-1] // d) // heads
    own = slice(group * d, group * d + d)
    return (q @ keys[:, own].T / d**0.5).softmax(-1) @ values[:, own]
