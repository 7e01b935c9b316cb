"""Indices at equal distances, the first and the last among them: exact, or as a linspace of floats rounds them."""

from fractions import Fraction
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor


@lru_cache(maxsize=256)
def evenly(n: int, count: int, device: torch.device | None = None, *, floats: bool = False) -> Int[Tensor, " count"]:
    """`count` of n indices, ascending: i (n − 1) / (count − 1), halves to the even one. One of them is the first.

    Args:
        floats: as a linspace in fp32 rounds them, which now and then is the other neighbour of a half; where it would
            name an index twice, exact.
    """
    if floats:
        found = torch.linspace(0, n - 1, steps=count).round().long().clamp(0, n - 1)
        if bool((found.diff() > 0).all()):
            return found.to(device)
    gaps = max(1, count - 1)
    whole, rest = torch.div(at := torch.arange(count) * (n - 1), gaps, rounding_mode="floor"), at % gaps
    up = (2 * rest > gaps) | ((2 * rest == gaps) & (whole % 2 == 1))
    return (whole + up).to(device)


def evenly_naive(n: int, count: int) -> list[int]:
    """The same with fractions."""
    return [round(Fraction(i * (n - 1), max(1, count - 1))) for i in range(count)]
