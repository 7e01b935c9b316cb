"""How far layers move a token, summed over layers, and how much the text behind the picture looks at it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Choice, Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor

SETTINGS = {"ratios": ("80%", "50%", "30%"), "layers": (1, 2, 3), "start": 0}


def moved(u: Tensor, o: Tensor) -> Tensor:
    """`[n, D]` before and after a module to `[n]`."""
    cosine = (u * o).sum(1) / (u.norm(dim=1) * o.norm(dim=1))
    turn = (1 - cosine).exp()
    return o.norm(dim=1) / u.norm(dim=1) * turn / turn.sum()


@torch.no_grad()
def by_layer(reference: Reference, layer: int, seen: Seen, entry: Entry) -> dict[int, float]:
    """What a layer's two modules, called one by one, make of the token at each logical position."""
    block = reference.lm.layers[layer]
    rope = reference.lm.rotary_emb(seen.hidden, entry.positions[..., seen.held])
    u1 = block.input_layernorm(seen.hidden)
    o1, _ = block.self_attn(hidden_states=u1, attention_mask=None, position_embeddings=rope)
    u2 = block.post_attention_layernorm(seen.hidden + o1)
    both = moved(u1[0], o1[0]) + moved(u2[0], block.mlp(u2)[0])
    return dict(zip(seen.held.tolist(), both.tolist(), strict=True))


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    ratios: Sequence[int | str],
    layers: Sequence[int],
    start: int,
) -> Hand:

    def at(layer: int, keep: int | str) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            now = seen[-1]
            sums = [by_layer(reference, i, seen[i], entry) for i in range(start, layer)]
            own = Tensor([sum(one[position] for one in sums) for position in now.held[rows].tolist()])
            looks = reference.lm_attention(layer, now, entry).mean(0)[now.held > entry.items[-1][-1]].mean(0)[rows]
            score = own / own.sum() + looks / looks.sum()
            return rows[top(score, min(len(rows), share(keep, len(entry.content[number]), "down")))]

        return choose

    return Hand(entry, {layer: cut(entry, at(layer, keep)) for layer, keep in zip(layers, ratios, strict=True)})
