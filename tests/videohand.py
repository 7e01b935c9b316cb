"""What methods for videos share by hand: density peaks and runs of like frames, with lists; nothing imports winnow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor


def peaks(x: Tensor, near: int) -> tuple[list[int], list[list[float]]]:
    """The tokens `[n, D]` from the best centre to the worst, by density and distance to a denser one; all distances."""
    rows, every = x.double().tolist(), range(len(x))
    far = [[math.dist(a, b) / math.sqrt(len(a)) for b in rows] for a in rows]
    nearest = [sorted(row)[:near] for row in far]
    density = [math.exp(-sum(d * d for d in row) / len(row)) for row in nearest]
    most = max(map(max, far))
    apart = [min([far[i][j] for j in every if density[j] > density[i]], default=most) for i in every]
    return sorted(every, key=lambda i: (-apart[i] * density[i], i)), far


def clusters(x: Tensor, count: int, near: int) -> tuple[list[int], list[int]]:
    """The best centres, and for each token the number of its nearest one; a centre is its own."""
    order, far = peaks(x, near)
    centres = order[:count]
    return centres, [
        centres.index(i) if i in centres else min(range(count), key=lambda c: far[i][centres[c]]) for i in range(len(x))
    ]


def cut_apart(frames: Tensor, threshold: float, least: int) -> list[list[int]]:
    """Runs of frames `[T, D]` between cuts: where neighbours are unlike, and where they are least alike."""
    alike = torch.cosine_similarity(frames[:-1], frames[1:], dim=-1).tolist()
    cuts = set(sorted(range(len(alike)), key=lambda i: alike[i])[: least - 1])
    cuts |= {i for i, value in enumerate(alike) if value < threshold}
    return [list(range(a, b)) for a, b in pairwise([0, *(i + 1 for i in sorted(cuts)), len(frames)])]


def runs(labels: Sequence[int]) -> list[list[int]]:
    """The runs of frames of one label."""
    return [[i for i, _ in own] for _, own in groupby(enumerate(labels), key=lambda pair: pair[1])]


def contiguous(labels: Sequence[int]) -> list[list[int]]:
    """Runs of frames after all but the longest of each label, and those of one frame, went to what is beside them."""
    found = list(labels)
    for run in runs(labels):
        longest = max(len(other) for other in runs(labels) if labels[other[0]] == labels[run[0]])
        if len(run) < max(longest, 2):
            found[run[0] : run[-1] + 1] = [-1] * len(run)
    while -1 in found:
        now = runs(found)
        at = next(i for i, run in enumerate(now) if found[run[0]] == -1)
        left = now[at - 1] if at else []
        right = now[at + 1] if at + 1 < len(now) else []
        beside = right if len(right) > len(left) else left
        for i in now[at]:
            found[i] = found[beside[0]] if beside else 0
    return runs(found)
