"""The sequences that one call of a vision tower's attention holds, each with its real tokens alone."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError

# The keyword of older and of newer versions, and that of old classes.
CACHES = frozenset({"past_key_values", "cache", "layer_past"})

Part = tuple[Tensor, Tensor, Tensor]


def sequences(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, ends: Tensor | None) -> Iterator[Part]:
    """Queries, keys and values of a call, `[b, H, N, d]`, taken apart where its tokens do not all see each other.

    Implementations differ in how they keep pictures apart: by a call for each, by the ends of each in one call
    (FlashAttention), or by a mask that can also hide padding. What is shown is the same for all. The attention of a
    language model is shown as it is: its masks have other uses, and its signals are given them.

    Args:
        mask: True or 0 where a query sees a key: `[b, 1, N, N]`, or `[b, N]` for all queries alike.
        ends: `[pictures + 1]` where each picture begins, and the end.

    Raises:
        UnsupportedError: tokens see each other in some other way.
    """
    kind: Any = type(module)
    if _reads_cache(kind):
        yield q, k, v
    elif ends is not None:
        lengths = ends.diff().tolist()
        yield from zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    elif (visible := _visible(mask, q.shape[2])) is None:
        yield q, k, v
    else:
        for row in range(q.shape[0]):
            for tokens in _groups(module, visible[row if visible.shape[0] > 1 else 0]):
                yield q[row : row + 1, :, tokens], k[row : row + 1, :, tokens], v[row : row + 1, :, tokens]


@functools.cache
def _reads_cache(kind: Any) -> bool:
    """Whether a class of attention is a language model's."""
    return not CACHES.isdisjoint(inspect.signature(kind.forward).parameters)


def _visible(mask: Any, n: int) -> Tensor | None:
    """`[b or 1, N, N]` which keys each query sees; None where all see all."""
    if not isinstance(mask, Tensor):
        return None
    seen = mask >= 0 if mask.is_floating_point() else mask.bool()
    seen = seen[:, None] if seen.ndim == 2 else seen[:, 0]
    return None if bool(seen.all()) else seen.expand(-1, n, n)


def _groups(module: nn.Module, visible: Tensor) -> Iterator[Tensor]:
    """Indices of the tokens that see each other, and nobody else, by `[N, N]`; padding is in none of them."""
    left = visible.any(0)
    while bool(left.any()):
        own = visible[int(torch.argmax(left.to(torch.uint8)))]
        if not bool((visible[own] == own).all()):
            raise UnsupportedError(
                f"{type(module).__name__} attends through a mask that is neither padding nor pictures apart, which is "
                "not read yet; use a method that does not look at attention there."
            )
        yield own.nonzero()[:, 0]
        left = left & ~own
