"""VisionZip before the projector; in the LM, what visual tokens pay each other, and merging by keys of the layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Cut, Entry, Hand, Reference, Seen, share, top
from torch import Tensor
from torch.nn.functional import normalize
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from methods.byhand import feature_block, grid_of, shares

SETTINGS = {"tokens": (20, 14, 9, 5), "contextual": (5, 4, 3, 2), "layers": (1, 2, 3)}
BUILDS = ("llava_clip", "llava_next")  # those with [CLS]


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    tokens: Sequence[int],
    contextual: Sequence[int],
    layers: Sequence[int],
) -> Hand:
    first = _encoded(reference, sample, entry, tokens[0], contextual[0])
    cuts = {
        layer: _cut(reference, entry, layer, total, merged)
        for layer, total, merged in zip(layers, tokens[1:], contextual[1:], strict=True)
    }
    return Hand(first, cuts)


def _encoded(reference: Reference, sample: dict[str, Tensor], entry: Entry, total: int, contextual: int) -> Entry:
    vision, block = reference.vision(sample), feature_block(reference)
    embeds, held = entry.embeds, entry.held
    for picture, item in enumerate(entry.items):
        score = vision.cls[block][picture].mean(0).unflatten(0, (-1, reference.cells))
        features, keys, cells = vision.features[picture], vision.keys[block][picture], entry.cells[picture].tolist()
        parts = shares(share(total, len(cells)), [reference.cells + 1] * len(features))
        merged = shares(min(contextual, sum(n - 1 for n in parts)), [n - 1 for n in parts])
        cls, dominant, joined = [], [], []
        for tile, (n, c) in enumerate(zip(parts, merged, strict=True)):
            start, picked = tile * reference.cells, top(score[tile], n - c - 1).tolist()
            rest = [i for i in range(reference.cells) if i not in picked]
            cls.append((tile, features[tile, 0], None))
            dominant += [(tile, features[tile, 1 + i], start + i) for i in picked]
            rows = _merged(features[tile, 1:], keys[tile, 1:], rest, c)
            joined.append([(tile, row, start + i) for i, row in rows])
        grid = grid_of(reference, sample, picture)
        mosaic = sorted((d for d in dominant if d[0]), key=lambda d: grid(d[2]))
        thumbnail = [cls[0], *(d for d in dominant if not d[0]), *joined[0]]
        ordered = [*thumbnail, *mosaic, *cls[1:], *(row for own in joined[1:] for row in own)]
        rows = reference.model.model.multi_modal_projector(torch.stack([row for _, row, _ in ordered])[None])
        ids = torch.tensor([cells.index(cell) if cell in cells else 0 for _, _, cell in ordered])
        before, after = held < item[0], held > item[-1]
        embeds = torch.cat([embeds[:, before], rows, embeds[:, after]], 1)
        held = torch.cat([held[before], entry.content[picture][ids], held[after]])
    return Entry(embeds, held, entry.positions, entry.items, entry.content, entry.cells)


def _cut(reference: Reference, entry: Entry, layer: int, total: int, contextual: int) -> Cut:
    def apply(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        if not entry.content:
            return now
        everything = torch.isin(now.held, torch.cat(entry.content))
        score = reference.lm_attention(layer, now, entry).mean(0)[everything].mean(0)
        keys = _keys(reference, entry, layer, now)
        hidden, held = [], []
        start = 0
        for content in entry.content:
            rows = torch.isin(now.held, content).nonzero()[:, 0]
            n = min(total, len(rows))
            c = min(contextual, n - 1)
            picked = top(score[rows], n - c)
            rest = [i for i in range(len(rows)) if i not in picked.tolist()]
            merged = _merged(now.hidden[0, rows], keys[rows], rest, c)
            ids = torch.tensor([*picked.tolist(), *(i for i, _ in merged)])
            hidden += [now.hidden[0, start : rows[0]], now.hidden[0, rows[picked]], *(row[None] for _, row in merged)]
            held += [now.held[start : rows[0]], now.held[rows[ids]]]
            start = int(rows[-1]) + 1
        hidden, held = [*hidden, now.hidden[0, start:]], [*held, now.held[start:]]
        return Seen(torch.cat(hidden)[None], torch.cat(held))

    return apply


def _keys(reference: Reference, entry: Entry, layer: int, now: Seen) -> Tensor:
    """`[n, d]` keys after position embedding, mean over heads."""
    block = reference.model.model.language_model.layers[layer]
    k = block.self_attn.k_proj(block.input_layernorm(now.hidden)).unflatten(-1, (-1, block.self_attn.head_dim))
    cos, sin = reference.lm.rotary_emb(now.hidden, entry.positions[..., now.held])
    return apply_rotary_pos_emb(k.transpose(1, 2), k.transpose(1, 2), cos, sin)[1][0].mean(0)


def _merged(rows: Tensor, keys: Tensor, rest: list[int], c: int) -> list[tuple[int, Tensor]]:
    """Evenly spaced leftovers, each with the mean of those that are most like it added."""
    step = max(1, len(rest) // max(1, c))
    targets = [rest[k * step] for k in range(c)]
    unit, members = normalize(keys, dim=-1), {t: [] for t in targets}
    for i in rest if targets else ():
        if i not in members:
            alike = [float(unit[i] @ unit[t]) for t in targets]
            members[targets[alike.index(max(alike))]].append(rows[i])
    return [(t, rows[t] + (torch.stack(own).mean(0) if own else 0)) for t, own in members.items()]
