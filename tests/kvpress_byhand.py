"""What kvpress 0.5.4 keeps, written out slot by slot from what its presses compute; nothing here imports winnow.

Its scores are attention of the last queries, softmaxed over all keys that each of them reads. A ratio is what is
removed. Where scores are equal, its choice is not defined; the inputs of the tests have no equal scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attended(queries: Tensor, keys: Tensor, head: int, row: int) -> list[float]:
    """Attention of one query, counted from the end (1 is the newest), over all keys: `[H, q, d]` and `[G, N, d]`."""
    n, group = keys.shape[1], queries.shape[0] // keys.shape[0]
    reads = n - row + 1
    logits = [x / math.sqrt(keys.shape[2]) for x in (keys[head // group, :reads] @ queries[head, -row]).tolist()]
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    whole = sum(powers)
    return [p / whole for p in powers] + [0.0] * (n - reads)


def snapkv_scores(queries: Tensor, keys: Tensor, window: int = 64, kernel: int = 5) -> list[list[float]]:
    """Scores of each KV head: a mean over the window, then over neighbours, then over the query heads."""
    heads, n, group = queries.shape[0], keys.shape[1], queries.shape[0] // keys.shape[0]
    before = n - window
    pooled = []
    for head in range(heads):
        rows = [attended(queries, keys, head, row) for row in range(window, 0, -1)]
        votes = [sum(row[i] for row in rows) / window for i in range(before)]
        reach = kernel // 2
        around = [[votes[j] for j in range(i - reach, i + reach + 1) if 0 <= j < before] for i in range(before)]
        pooled.append([sum(near) / kernel for near in around])
    means = [
        [sum(pooled[g * group + h][i] for h in range(group)) / group for i in range(before)]
        for g in range(keys.shape[0])
    ]
    best = max(map(max, means)) + 1
    return [own + [best] * window for own in means]


def tova_scores(queries: Tensor, keys: Tensor) -> list[list[float]]:
    """The same for every KV head: the newest query, a mean over all query heads; the newest slot comes first."""
    rows = [attended(queries, keys, head, 1) for head in range(queries.shape[0])]
    mean = [sum(row[i] for row in rows) / len(rows) for i in range(keys.shape[1] - 1)]
    return [[*mean, max(mean) + 1]] * keys.shape[0]


def kept_count(n: int, ratio: float) -> int:
    """Slots that stay of n."""
    return int(n * (1 - ratio))


def pyramid_count(n: int, ratio: float, layer: int, depth: int, window: int = 64, beta: int = 20) -> int:
    """Slots that a layer keeps; equal budgets, unsaid, where the smallest would be below the window."""
    mean = n * (1 - ratio)
    least, largest = mean / beta, 2 * mean - mean / beta
    if largest >= n - window:
        largest = n - window
        least = 2 * mean - largest
    if not n >= largest >= least >= window:
        return round(mean)
    return round(largest - layer * (largest - least) / (depth - 1))


def best(scores: list[list[float]], count: int) -> list[list[int]]:
    """The slots of each head with the highest scores."""
    return [sorted(sorted(range(len(own)), key=lambda i: -own[i])[:count]) for own in scores]


def adakv_kept(scores: list[list[float]], ratio: float, floor: float = 0.2) -> list[list[int]]:
    """The best over all heads of a layer, after each head's own best have been made sure of."""
    n, heads = len(scores[0]), len(scores)
    count = kept_count(n, ratio)
    sure = [set(own) for own in best(scores, int(count * floor))]
    rated = [(math.inf if i in sure[h] else scores[h][i], h, i) for h in range(heads) for i in range(n)]
    left = sorted(rated, key=lambda x: -x[0])[: heads * count]
    return [sorted(i for _, h, i in left if h == head) for head in range(heads)]


def random_layer(seed: int, n: int, heads: int = 4, groups: int = 2, d: int = 16) -> tuple[Tensor, Tensor]:
    """Queries `[H, N, d]` and keys `[G, N, d]` whose attention is neither flat nor on one slot."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.tensor([0.5, 2.0]).repeat(groups)[:groups, None, None]
    return torch.randn(heads, n, d, generator=generator), sharpness * torch.randn(groups, n, d, generator=generator)
