"""ToC3D on one drive worked by hand: token by token, window by window, from the weights of a backbone alone.

Nothing here calls the halves of a block, the routing, or the scores of winnow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

SIDE, SELECTORS, RATIOS = 8, (1, 3), (0.5, 0.3)
Half = Callable[[Any, Tensor, list[int]], Tensor]


def heads_of(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of rows `[m, C]`, head by head."""
    parts = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        parts.append((a @ b.T / a.shape[1] ** 0.5).softmax(1) @ c)
    return torch.cat(parts, 1)


def normed(x: Tensor, norm: Any) -> Tensor:
    return layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def on(x: Tensor, layer: Any) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def turned(x: Tensor, places: list[int], side: int, heads: int) -> Tensor:
    """Each head's halves as complex numbers, half of the frequencies by the row of a place and half by its column."""
    width = x.shape[1] // heads
    bands = 4.0 ** -torch.arange(width // 4)
    at = torch.stack([torch.cat([p // side * bands, p % side * bands]) for p in places])
    made = []
    for own in x.chunk(heads, 1):
        z = torch.complex(own[:, : width // 2], own[:, width // 2 :]) * torch.exp(1j * at)
        made += [z.real, z.imag]
    return torch.cat(made, 1)


def own_block(block: Any, x: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
    q, k, v = on(normed(x, block.first), block.qkv).chunk(3, 1)
    q, k = (turned(y, places, block.side, block.heads) for y in (q, k))
    first = on(heads_of(q, k, v, block.heads), block.out)
    enter, _, leave = block.mlp
    return first, on(gelu(on(normed(x + first, block.second), enter)), leave)


def vitdet_layer(layer: Any, x: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
    q, k, v = on(normed(x, layer.norm1), layer.attention.qkv).chunk(3, 1)
    first = on(heads_of(q, k, v, layer.attention.num_heads), layer.attention.proj)
    return first, on(gelu(on(normed(x + first, layer.norm2), layer.mlp.fc1)), layer.mlp.fc2)


def siglip_layer(layer: Any, x: Tensor, places: list[int]) -> tuple[Tensor, Tensor]:
    attention, y = layer.self_attn, normed(x, layer.layer_norm1)
    q, k, v = (on(y, own) for own in (attention.q_proj, attention.k_proj, attention.v_proj))
    first = on(heads_of(q, k, v, attention.num_heads), attention.out_proj)
    inner = on(normed(x + first, layer.layer_norm2), layer.mlp.fc1)
    return first, on(gelu(inner, approximate="tanh"), layer.mlp.fc2)


def window_of(token: int, side: int) -> tuple[int, int, int]:
    camera, row, col = token // SIDE**2, token // SIDE % SIDE, token % SIDE
    return camera, row // side, col // side


def routed(halves: Any, layer: Any, x: Tensor, score: Tensor | None, ratio: float, side: int) -> Tensor:
    """One layer, window by window."""
    out = x.clone()
    windows: dict[tuple[int, int, int], list[int]] = {}
    for token in range(len(x)):
        windows.setdefault(window_of(token, side), []).append(token)
    for own in windows.values():
        keep = len(own) if score is None else max(1, math.ceil(ratio * side**2))
        order = sorted(range(len(own)), key=lambda i: 0.0 if score is None else -float(score[own[i]]))
        kept, rest = sorted(order[:keep]), order[keep:]
        rows = [x[own[i]] for i in kept]
        if rest:
            chance = torch.stack([score[own[i]].exp() for i in rest])
            rows.append(sum(c / chance.sum() * x[own[i]] for c, i in zip(chance, rest, strict=True)))
        update = sum(halves(layer, torch.stack(rows), [*kept, keep][: len(rows)]))
        for number, i in enumerate(kept):
            out[own[i]] = x[own[i]] + update[number]
        for i in rest:
            out[own[i]] = x[own[i]] + update[-1]
    return out


def by_queries(judge: Any, x: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
    """`[n]` logarithms of being salient."""
    found = []
    for row, weight in zip(x, mask, strict=True):
        own = on(weight * row, judge.project)
        said = on(torch.stack([own @ query for query in queries]) / queries.shape[1] ** 0.5, judge.judge)
        found.append(said[0] - said.logsumexp(0))
    return torch.stack(found)


def by_itself(judge: Any, x: Tensor, mask: Tensor) -> Tensor:
    """The same where nothing is remembered."""
    norm, enter, _ = judge.enter
    rows = torch.stack([gelu(on(normed(w * row, norm), enter)) for row, w in zip(x, mask, strict=True)])
    own, shared = rows.chunk(2, 1)
    mean = sum(w * row for row, w in zip(shared, mask, strict=True)) / mask.sum()
    first, _, last = judge.judge
    said = torch.stack([on(gelu(on(torch.cat([row, mean]), first)), last) for row in own])
    return said[:, 0] - said.logsumexp(1)


def patched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[cameras, 3, H, W]` through a convolution of patches, as rows `[n, C]`."""
    return conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).mT.flatten(0, 1)


@torch.no_grad()
def logits(detector: Any, first: Tensor, layers: list[tuple[Any, Any, int]], queries: Tensor | None) -> Tensor:
    """`[n, K + 4]` what the detector says of one drive.

    Args:
        first: `[n, C]` the rows that go into the first layer.
        layers: for each how its halves are worked, itself, and the side of its windows.
        queries: `[Q, C]`; None where nothing is remembered.
    """
    x, mask, score, ratio = first, torch.ones(len(first)), None, 1.0
    for number, (halves, layer, side) in enumerate(layers):
        if number in SELECTORS:
            stage = SELECTORS.index(number)
            if queries is None:
                score = by_itself(detector.by_token[stage], x, mask)
            else:
                score = by_queries(detector.by_history[stage], x, mask, queries)
            mask, ratio = mask * score.exp(), RATIOS[stage]
        x = routed(halves, layer, x, score, ratio, side)
    enter, _, leave = detector.head
    said = on(gelu(on(normed(x, detector.norm), enter)), leave)
    return torch.cat([said[:, :-4] - 4.0, said[:, -4:]], 1)
