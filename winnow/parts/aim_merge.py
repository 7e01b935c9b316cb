"""AIM's merging: half of the tokens, those in even places, each go to the most similar token in an odd place.

ToMe's bipartite matching, with other numbers: a token that is merged into and those that are merged into it count alike
(sizes of earlier rounds are not counted), no token is protected, and the similarity is that of the tokens themselves.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from winnow.core.layout import Layout


class Merged(NamedTuple):
    """What the tokens of each picture became.

    Attributes:
        cluster: the output that a token feeds.
        weight: with which it does.
        representative: the token that stands for each output.
    """

    cluster: Int[Tensor, "g n"]
    weight: Float[Tensor, "g n"]
    representative: Int[Tensor, "g m"]


def schedule(n: int, rounds: int) -> list[tuple[int, int]]:
    """For each round, how many tokens it finds and how many of them it merges: n/2, n/4, n/8, …"""
    found, t = [], n
    for number in range(1, rounds + 1):
        gone = min(n >> number, t // 2)
        found.append((t, gone))
        t -= gone
    return found


def merge(x: Float[Tensor, "g n d"], rounds: int) -> Merged:
    """Merge a half of n tokens, then a quarter of n, then an eighth, …: the most similar pairs of each round.

    Outputs are the tokens in even places that were not merged, most similar first, then those in odd places, in order.
    Ties go to the lowest index.
    """
    cluster = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    weight, representative = torch.ones_like(x[..., 0]), cluster
    for t, gone in schedule(x.shape[1], rounds):
        if gone == 0:
            break
        unit = normalize(x, dim=-1)
        closest, target = (unit[:, ::2] @ unit[:, 1::2].mT).max(2)
        order = closest.sort(dim=1, descending=True, stable=True).indices
        stay, go = order[:, gone:], order[:, :gone]
        left = stay.shape[1]
        odd = torch.arange(t // 2, device=x.device).expand(len(x), -1)
        to = torch.empty(len(x), t, dtype=torch.int64, device=x.device)
        to[:, 1::2] = odd + left
        to.scatter_(1, go * 2, target.gather(1, go) + left)
        to.scatter_(1, stay * 2, torch.arange(left, device=x.device).expand_as(stay))
        size = x.new_zeros(len(x), t - gone).scatter_add_(1, to, torch.ones_like(x[..., 0]))
        own = 1 / size.gather(1, to)
        sums = x.new_zeros(len(x), t - gone, x.shape[2])
        x = sums.scatter_add_(1, to[..., None].expand_as(x), x * own[..., None])
        weight, cluster = weight * own.gather(1, cluster), to.gather(1, cluster)
        representative = representative.gather(1, torch.cat([stay * 2, odd * 2 + 1], 1))
    return Merged(cluster, weight, representative)


@lru_cache(maxsize=64)
def groups_of(layout: Layout, device: torch.device) -> tuple[Int[Tensor, " _"], ...]:
    """The content tokens of each tile of a layout."""
    tiles = layout.tiles
    return tuple(torch.from_numpy(np.flatnonzero(tiles == t)).to(device) for t in range(tiles.max() + 1))


def merge_groups(
    x: Float[Tensor, "n d"], groups: Sequence[Int[Tensor, " _"]], rounds: int
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"], Int[Tensor, " m"]]:
    """Merge the tokens of one item within groups: equal groups at once.

    Returns:
        Cluster, weight and representatives as `merge` gives them, the outputs of one group behind those of another.
    """
    sizes = [len(g) for g in groups]
    start = [0, *accumulate(n - sum(gone for _, gone in schedule(n, rounds)) for n in sizes)]
    cluster, weight = torch.empty(len(x), dtype=torch.int64, device=x.device), x.new_empty(len(x))
    representative = cluster.new_empty(start[-1])
    for size in sorted(set(sizes)):
        own = [t for t, n in enumerate(sizes) if n == size]
        part = merge(x[torch.stack([groups[t] for t in own])], rounds)
        for number, t in enumerate(own):
            cluster[groups[t]], weight[groups[t]] = part.cluster[number] + start[t], part.weight[number]
            representative[start[t] : start[t + 1]] = groups[t][part.representative[number]]
    return cluster, weight, representative


@lru_cache(maxsize=64)
def in_place(layout: Layout, rounds: int) -> bool:
    """Whether representatives of merged tiles ascend: tiles follow each other, and all tokens in even places merge."""
    tiles = layout.tiles
    sizes = np.bincount(tiles).tolist()
    halves = all(t == 2 * gone or gone == 0 for n in sizes for t, gone in schedule(n, rounds))
    return halves and bool((np.diff(tiles) >= 0).all())


def merge_naive(x: Sequence[Sequence[float]], rounds: int) -> list[dict[int, float]]:
    """The same over lists: for each output, the weights of its sources; the representative comes first."""
    rows = [list(row) for row in x]
    sources: list[dict[int, float]] = [{i: 1.0} for i in range(len(rows))]

    def alike(a: list[float], b: list[float]) -> float:
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        return dot / (sum(p * p for p in a) * sum(q * q for q in b)) ** 0.5

    for number in range(1, rounds + 1):
        t = len(rows)
        gone = min(len(x) >> number, t // 2)
        odd = range(1, t, 2)
        if gone == 0:
            break
        best = {i: max(odd, key=lambda j, i=i: alike(rows[i], rows[j])) for i in range(0, t, 2)}  # type: ignore[misc]
        ranked = sorted(best, key=lambda i: -alike(rows[i], rows[best[i]]))
        groups = [[i] for i in ranked[gone:]] + [[j, *(i for i in ranked[:gone] if best[i] == j)] for j in odd]
        rows, sources = (
            [[sum(rows[i][c] for i in group) / len(group) for c in range(len(rows[0]))] for group in groups],
            [{k: w / len(group) for i in group for k, w in sources[i].items()} for group in groups],
        )
    return sources
