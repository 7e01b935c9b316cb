"""What methods by hand share that read chunks of frames with small transformers: where tokens lie, and a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import zoo
from byhand import Entry, Reference
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import frames_of, grid_of

Spot = tuple[int, int, int]
BUILDS = ("qwen2_5_vl", "llava_next_video", "llava_clip")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}


def spots(reference: Reference, sample: dict[str, Tensor], entry: Entry, number: int) -> list[Spot]:
    """Frame, row and column of each token."""
    frames, own = frames_of(sample, entry, number)
    if frames == 1:
        where = grid_of(reference, sample, number)
        return [(0, *where(int(cell))) for cell in entry.cells[number]]
    wide = math.isqrt(own)
    if "video_grid_thw" in sample:
        before = [int(sample["input_ids"][0, content[0]]) for content in entry.content[:number]]
        wide = int(sample["video_grid_thw"][before.count(zoo.VIDEO), 2]) // 2
    return [(i // own, *divmod(i % own, wide)) for i in range(frames * own)]


def chunks(frames: int, own: int, every: int) -> list[range]:
    """The tokens of each chunk."""
    return [range(first * own, min(first + every, frames) * own) for first in range(0, frames, every)]


def waves(place: Sequence[int], width: int) -> Tensor:
    """Sines, then cosines, of whole numbers at falling frequencies."""
    bands = width // (2 * len(place))
    angles = [at * 0.01 ** (k / bands) for at in place for k in range(bands)]
    found = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(found + [0.0] * (width - len(found)))


def spread(n: int, count: int) -> list[int]:
    """As many of n numbers, at equal distances from the first to the last."""
    return [round(i * (n - 1) / max(1, count - 1)) for i in range(count)]


def normed(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def attended(
    x: Tensor, read: Tensor, matrices: Sequence[Tensor], heads: int, sees: Callable[[int], list[int]]
) -> tuple[Tensor, Tensor]:
    """Row by row and head by head, over the rows that each one sees; and the mean attention of the heads."""
    kv, out, q = matrices
    width = x.shape[1] // heads
    rows, weights = [], torch.zeros(len(x), len(read))
    keys, values = (read @ kv.T).chunk(2, 1)
    for i, row in enumerate(x):
        own, parts = sees(i), []
        for h in range(heads):
            at = slice(h * width, (h + 1) * width)
            share = (keys[own][:, at] @ (row @ q.T)[at] / width**0.5).softmax(0)
            parts.append(share @ values[own][:, at])
            weights[i, own] += share / heads
        rows.append(torch.cat(parts) @ out.T)
    return torch.stack(rows), weights


def layer_shapes(width: int, cross: bool = False) -> list[tuple[int, int]]:
    """Of the matrices of a layer, in the order of their names."""
    attention = [(2 * width, width), (width, width), (width, width)]
    return [*attention, *(attention if cross else []), (width, 2 * width), (2 * width, width)]


def layer(
    x: Tensor,
    matrices: Sequence[Tensor],
    heads: int,
    sees: Callable[[int], list[int]],
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A pre-norm layer, and its attention to the context, or to itself."""
    *attention, down, up = matrices
    own = normed(x)
    read, weights = attended(own, own, attention[:3], heads, sees)
    x = x + read
    if context is not None:
        read, weights = attended(normed(x), context, attention[3:], heads, lambda i: list(range(len(context))))
        x = x + read
    return x + gelu(normed(x) @ up.T) @ down.T, weights
