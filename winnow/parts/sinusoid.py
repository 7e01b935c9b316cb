"""Sinusoidal positions: a place as sines and cosines of many wave lengths."""

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from winnow.core.layout import Layout

LONGEST = 10000.0  # the longest wave over the shortest


def sinusoid(place: Shaped[Tensor, "*shape"], width: int) -> Float[Tensor, "*shape width"]:
    """Sines in the first half of the channels, cosines in the second; of an odd width the last channel is 0."""
    half = width // 2
    rate = LONGEST ** (-torch.arange(half, device=place.device, dtype=torch.float32) / max(1, half))
    angle = place[..., None].to(torch.float32) * rate
    rest = angle.new_zeros(*angle.shape[:-1], width - 2 * half)
    return torch.cat([angle.sin(), angle.cos(), rest], -1)


@lru_cache(maxsize=16)
def places(layout: Layout, width: int, device: torch.device) -> Float[Tensor, "v width"]:
    """Frame, row and column of each content token: the sum of their sinusoids."""
    place = torch.from_numpy(layout.place[layout.content][:, 1:].copy()).to(device)
    return sinusoid(place, width).sum(-2)


def sinusoid_naive(place: float, width: int) -> list[float]:
    """The same of one place."""
    half = width // 2
    angles = [place / LONGEST ** (i / half) for i in range(half)]
    return [*map(math.sin, angles), *map(math.cos, angles), *[0.0] * (width - 2 * half)]
