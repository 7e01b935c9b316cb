"""Each frame as two tokens by two, which read their frame in two layers; text reads all frames there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Read, Reference, Seen
from torch import Tensor

from methods.byhand import frames_of, glorot
from methods.byhand.kffocus import sides_of
from methods.byhand.slow_fast_video_mllm import normed, read

SETTINGS = {"grid": 2, "layers": (0, 2), "gate": 0.8, "weights": "untrained"}
BUILDS = ("qwen2_5_vl", "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    grid: int,
    layers: Sequence[int],
    gate: float,
    weights: str,
) -> Hand:
    where: list[tuple[int, int, int]] = []  # frame, row and column of each token of all items, one behind the other
    number_of: list[int] = []
    for number in range(len(entry.content)):
        frames, places = frames_of(sample, entry, number)
        h, w = sides_of(sample, entry, number, places)
        where += [(t, r, c) for t in range(frames) for r in range(h) for c in range(w)]
        number_of += [number] * (frames * h * w)

    def pool(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            frames, places = frames_of(sample, entry, number)
            h, w = sides_of(sample, entry, number, places)
            stay[content] = False
            for t in range(frames):
                for rows in spans(h, grid):
                    for columns in spans(w, grid):
                        window = [t * places + r * w + c for r in rows for c in columns]
                        middle = t * places + rows[(len(rows) - 1) // 2] * w + columns[(len(columns) - 1) // 2]
                        hidden[0, content[middle]] = now.hidden[0, content[window]].mean(0)
                        stay[content[middle]] = True
        return Seen(hidden[:, stay], now.held[stay])

    visual = torch.cat([torch.zeros(0, dtype=torch.int64), *entry.items])
    content = torch.cat([visual[:0], *entry.content])
    attention = reference.lm.layers[0].self_attn
    wide, narrow = (p.out_features for p in (attention.q_proj, attention.k_proj))
    width, d = entry.embeds.shape[-1], attention.head_dim
    full = normed(entry.embeds[0, content])
    placed = full + torch.stack([embedding(place, width) for place in where]) if where else full
    # By name, first those of the text, layer by layer; of each the keys, the values, the output and the queries.
    shapes = [(narrow, width), (narrow, width), (width, wide), (wide, width)]
    matrices = iter(glorot(shapes * (2 * len(layers))))
    made = {(kind, layer): [next(matrices) for _ in shapes] for kind in ("text", "visual") for layer in layers}

    def attended(h: Tensor, kind: str, layer: int, tokens: Tensor) -> Tensor:
        keys, values, out, queries = made[kind, layer]
        q = (normed(h) @ queries.T).split(d, -1)
        k, v = placed[tokens] @ keys.T, full[tokens] @ values.T
        return (
            torch.tensor(gate).tanh() * torch.cat([read(own, k, v, i, len(q)) for i, own in enumerate(q)], -1) @ out.T
        )

    def states(h: Tensor, held: Tensor | None, layer: int) -> Tensor:
        everything = torch.arange(len(content))
        if held is None:
            return attended(h, "text", layer, everything)
        added = torch.zeros_like(h)
        for row, at in enumerate(held.tolist()):
            if at in content:
                token = int((content == at).nonzero())
                own = [
                    i for i in range(len(where)) if where[i][0] == where[token][0] and number_of[i] == number_of[token]
                ]
                added[row] = attended(h[row : row + 1], "visual", layer, torch.tensor(own))[0]
            elif at not in visual:
                added[row] = attended(h[row : row + 1], "text", layer, everything)[0]
        return added

    reads = {k: Read(states=lambda h, held, k=k: states(h, held, k)) for k in layers}
    return Hand(entry, {0: pool}, reads if len(content) else {})


def spans(n: int, parts: int) -> list[list[int]]:
    """n places in windows of nearly equal length, which overlap where they must."""
    parts = min(n, parts)
    return [[place for place in range(n) if i * n // parts <= place < (i + 1) * n / parts] for i in range(parts)]


def embedding(place: tuple[int, int, int], width: int) -> Tensor:
    half = width // 3 // 2
    made = torch.zeros(width)
    for axis, at in enumerate(place):
        first = axis * (width // 3)
        for i in range(half):
            angle = torch.tensor(at / 10000 ** (i / half))
            made[first + i], made[first + half + i] = angle.sin(), angle.cos()
    return made
