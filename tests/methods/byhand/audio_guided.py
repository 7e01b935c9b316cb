"""What is heard in each window of a sound, and of each window of the video the tokens that change most, in plain loops.

No build of the zoo hears: `tests/methods/test_audio_guided.py` runs the method on those that do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SETTINGS = {"keep": "40%", "window": 15, "top": 0.4}
BUILDS = ()


def chosen(x: Tensor, frames: int, received: list[float], kept: int, window: int, top: float) -> list[int]:
    """The tokens of one video that stay, ascending.

    Args:
        x: `[V, D]` its tokens, frame by frame.
        received: attention that each token of its sound receives; empty where there is none.
    """
    places, sound = len(x) // frames, len(received)
    middles = [(t + 0.5) / frames * sound for t in range(frames)]
    of_frame = [int(middle // window) for middle in middles]
    windows = max(1, math.ceil(sound / window))
    best = sorted(range(sound), key=lambda i: (-received[i], i))[: max(1, round(top * sound))] if sound else []
    heard = [sum(int((i + 0.5) // window) == w for i in best) for w in range(windows)]
    mean = sum(heard) / windows
    sizes = [of_frame.count(w) * places for w in range(windows)]
    ratios = [kept / len(x) * (0.5 + (own / mean if mean else 0.5)) for own in heard]
    weights = [min(1.0, max(0.05, ratio)) * size for ratio, size in zip(ratios, sizes, strict=True)]
    change = [10 - place * 0.6180339887498949 % 1 for place in range(places)]
    x = x.double()
    change += [1 - float(torch.cosine_similarity(x[j], x[j - places], dim=0)) for j in range(places, len(x))]
    found = []
    for w, quota in enumerate(dealt(kept, weights, sizes)):
        own = [j for j in range(len(x)) if of_frame[j // places] == w]
        found += sorted(own, key=lambda j: (-change[j], j))[:quota]
    return sorted(found)


def dealt(total: int, weights: list[float], sizes: list[int]) -> list[int]:
    """A total in proportion to weights, none above its size; what is left goes to the largest remainders."""
    exact: dict[int, float] = {i: 0.0 for i, size in enumerate(sizes) if not size}
    while len(exact) < len(sizes):
        rest = [i for i in range(len(sizes)) if i not in exact]
        level = (total - sum(exact.values())) / sum(weights[i] for i in rest)
        full = [i for i in rest if weights[i] * level > sizes[i]]
        exact |= {i: float(sizes[i]) for i in full} if full else {i: weights[i] * level for i in rest}
    found = [math.floor(exact[i] + 1e-9) for i in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda i: (found[i] >= sizes[i], found[i] - exact[i], i))
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found
