"""What the detector reads cameras with: patches, blocks in halves on windows, and how a block routes tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from winnow.parts.slow_fast import slow_fast
from winnow.world.streets import CAMERAS, PIXELS

PATCH = 8
SIDE = PIXELS // PATCH
TOKENS = CAMERAS * SIDE**2
WINDOW = 4


class Patches(nn.Linear):
    """`[B, cameras, H, W, 3]` pixels from 0 to 1 as `[B, N, C]` tokens, camera by camera and row by row."""

    def forward(self, images: Float[Tensor, "b cameras h w 3"]) -> Float[Tensor, "b n c"]:
        grid = images.unflatten(2, (SIDE, PATCH)).unflatten(4, (SIDE, PATCH)).permute(0, 1, 2, 4, 3, 5, 6)
        return super().forward(grid.flatten(4).flatten(1, 3) - 0.5)


class Block(nn.Module):
    """A transformer block in two halves, as `slow_fast` takes them; rotations say where a token lies in its window."""

    angles: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        bands = 4.0 ** -torch.arange(width // heads // 4)
        row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        angles = torch.cat([row.reshape(-1, 1) * bands, col.reshape(-1, 1) * bands], 1)
        self.register_buffer("angles", angles, persistent=False)

    def attention(self, x: Float[Tensor, "b m c"], places: Int[Tensor, "b m"]) -> Float[Tensor, "b m c"]:
        q, k, v = self.qkv(self.first(x)).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        angles = self.angles[places][:, None]
        made = scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v)
        return self.out(made.transpose(1, 2).flatten(2))

    def update(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b m c"]:
        return self.mlp(self.second(x))


def rotated(x: Float[Tensor, "b h m e"], angles: Float[Tensor, "b 1 m f"]) -> Float[Tensor, "b h m e"]:
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


@dataclass(frozen=True)
class Backbone:
    """What reads the cameras in the place of the detector's own blocks.

    Attributes:
        width: of its tokens.
        patch: makes tokens of images, as `Patches`.
        blocks: in halves, as `Block`: `attention`, `update`, and the `side` of their windows.
    """

    width: int
    patch: nn.Module
    blocks: nn.ModuleList


def routed(
    block: Any, x: Float[Tensor, "b n c"], score: Float[Tensor, "b n"] | None, ratio: float, legacy: bool
) -> Float[Tensor, "b n c"]:
    """A block on windows of equal size, each of which keeps as many tokens."""
    side = block.side
    own = windowed(x, side)
    given = own.new_zeros(own.shape[:2]) if score is None else windowed(score[..., None], side)[..., 0]
    keep = max(1, math.ceil(ratio * side**2))
    made = slow_fast(own, given, keep, block.attention, block.update, legacy=legacy)
    return unwindowed(made, side, x.shape[0])


def windowed(x: Float[Tensor, "b n c"], side: int) -> Float[Tensor, "w m c"]:
    parts = SIDE // side
    grid = x.reshape(-1, parts, side, parts, side, x.shape[-1])
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, side**2, x.shape[-1])


def unwindowed(x: Float[Tensor, "w m c"], side: int, b: int) -> Float[Tensor, "b n c"]:
    parts = SIDE // side
    grid = x.reshape(-1, parts, parts, side, side, x.shape[-1])
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(b, -1, x.shape[-1])
