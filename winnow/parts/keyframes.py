"""Keyframes, as a video codec sets them: where a frame is no longer like the last keyframe (KFFocus)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize


class Keyframes(NamedTuple):
    """Which frames are keyframes, and how much each frame repeats the keyframe before it.

    Attributes:
        key: `[b, t]`.
        repeats: `[b, t]` mean cosine with the last keyframe before the frame; −1 of the first frame.
    """

    key: Bool[Tensor, "b t"]
    repeats: Float[Tensor, "b t"]


def likeness(regions: Float[Tensor, "b t r d"]) -> Float[Tensor, "b t t"]:
    """Mean over regions of the cosines of each two frames; a region of zeros, or a broken one, has 0."""
    wide = regions.to(torch.promote_types(regions.dtype, torch.float32))
    broken = ~wide.sum(-1, keepdim=True).isfinite()
    x = normalize(wide.masked_fill(broken, 0), dim=-1).transpose(1, 2)
    return torch.stack([(own @ own.transpose(1, 2)).mean(0) for own in x])


def keyframes(alike: Float[Tensor, "b t t"], threshold: Float[Tensor, " b"], longest: int = 0) -> Keyframes:
    """The first frame, and each that is less like the last keyframe than a threshold.

    Args:
        longest: frames from one keyframe to the next at the most; 0: any number.
    """
    b, t, _ = alike.shape
    lane, last = torch.arange(b, device=alike.device), torch.zeros(b, dtype=torch.int64, device=alike.device)
    key, repeats = [torch.ones_like(last, dtype=torch.bool)], [torch.full_like(alike[:, 0, 0], -1)]
    for now in range(1, t):
        own = alike[lane, now, last]
        new = own < threshold
        if longest:
            new = new | (now - last >= longest)
        last = torch.where(new, now, last)
        key.append(new)
        repeats.append(own)
    return Keyframes(torch.stack(key, 1), torch.stack(repeats, 1))


def so_many_keyframes(alike: Float[Tensor, "t t"], count: int) -> Keyframes:
    """So many keyframes of one video: the threshold is sought by halving; what it leaves over are the newest frames.

    Of frames that are equally new the first ones are taken.
    """
    levels = alike.flatten().sort().values.unique()
    low, high = -1, len(levels)  # no more than the count at `low`
    while high - low > 1:
        middle = (low + high) // 2
        found = keyframes(alike[None], levels[middle, None])
        low, high = (middle, high) if int(found.key.sum()) <= count else (low, middle)
    found = keyframes(alike[None], levels[low, None] if low >= 0 else levels[:1] - 1)
    rest = found.repeats.masked_fill(found.key, torch.inf)[0].sort(stable=True).indices[: count - int(found.key.sum())]
    return Keyframes(found.key.index_fill(1, rest, True), found.repeats)


def with_context(key: Sequence[bool], context: int) -> list[int]:
    """The keyframes, and so many frames at equal distances between two of them."""
    starts = [t for t, own in enumerate(key) if own]
    chosen = []
    for start, end in zip(starts, [*starts[1:], len(key)], strict=True):
        between, taken = end - start - 1, min(context, end - start - 1)
        chosen += [start, *(start + 1 + (2 * i + 1) * between // (2 * taken) for i in range(taken))]
    return chosen


def regions_of(places: Int[Tensor, "p 2"], sides: tuple[int, int], across: int = 4) -> Int[Tensor, " p"]:
    """The region of each row and column of a grid, across × across of them, or as many as there are rows or columns."""
    down, wide = (min(across, side) for side in sides)
    return places[:, 0] * down // sides[0] * wide + places[:, 1] * wide // sides[1]


def keyframes_naive(alike: Sequence[Sequence[float]], threshold: float, longest: int = 0) -> list[int]:
    """The same, frame by frame."""
    found = [0]
    for now in range(1, len(alike)):
        if alike[now][found[-1]] < threshold or (longest and now - found[-1] >= longest):
            found.append(now)
    return found
