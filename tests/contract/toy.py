"""A tiny vision-language model with random weights, written plainly: something for every point to act on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from winnow.core.info import ModelInfo
from winnow.core.layout import CONTENT, Layout


def rope(x: Tensor, pos: Tensor) -> Tensor:
    """Rotary embedding of `[H, n, d]` at positions `[n]`."""
    half = x.shape[-1] // 2
    angle = pos.to(x.dtype)[:, None] * 100.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Block(nn.Module):
    """A pre-LN block on one sequence `[n, D]`, in halves, so that something can happen between them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def split(self, x: Tensor) -> Tensor:
        """`[n, H·d]` to `[H, n, d]`."""
        return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)

    def qkv(self, u: Tensor, pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (self.split(f(u)) for f in (self.q, self.k, self.v))
        return (q, k, v) if pos is None else (rope(q, pos), rope(k, pos), v)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[H, n, s]`; `bias` broadcasts over the logits."""
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (logits if bias is None else logits + bias).softmax(-1)

    def join(self, weights: Tensor, v: Tensor) -> Tensor:
        return self.o((weights @ v).transpose(0, 1).flatten(1))

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        """The plain block: causal where there are positions. Nothing of the contract runs here."""
        q, k, v = self.qkv(self.norm1(x), pos)
        x = x + self.join(self.weights(q, k, None if pos is None else causal(len(x), len(x), x.dtype)), v)
        return x + self.mlp(self.norm2(x))


def causal(rows: int, keys: int, dtype: torch.dtype) -> Tensor:
    """Additive mask `[rows, keys]` of the last `rows` of `keys` tokens."""
    return torch.full((rows, keys), -torch.inf, dtype=dtype).triu(keys - rows + 1)


@dataclass(eq=False)
class Picture:
    """An item: patch embeddings `[tiles, h·w, D]`, the layouts that it has in the tower and in the LM, its pixels.

    `rows` maps a cell (content row of the tower, tile-major) to its row of the tower's layout.
    """

    patches: Tensor
    tower: Layout
    lm: Layout
    pixels: Tensor | None = None

    @property
    def rows(self) -> dict[int, int]:
        at = self.tower
        return {int(at.cell[row]): int(row) for row in range(at.n) if at.kind[row] == CONTENT}


class ToyVLM(nn.Module):
    """Tower with [CLS], projector, causal LM with RoPE; float64."""

    def __init__(
        self, *, width: int = 16, heads: int = 2, depth: int = 4, vision_depth: int = 3, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cls = nn.Parameter(torch.randn(width))
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(vision_depth))
            self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            self.layers = nn.ModuleList(Block(width, heads) for _ in range(depth))
            for block in (*self.blocks, *self.layers):
                block.q.weight.data *= 4  # attention that is not uniform
        self.to(torch.float64).requires_grad_(False)
        self.info = ModelInfo(
            "ToyVLM",
            "toy",
            depth=depth,
            width=width,
            vision_depth=vision_depth,
            vision_width=width,
            points=("blocks", "blocks.mlp", "features", "projected", "layers", "kv"),
        )

    def encode(self, patches: Tensor) -> Tensor:
        """The plain tower on one tile `[h·w, D]`: `[1 + h·w, D]`."""
        x = torch.cat([self.cls[None], patches])
        for block in self.blocks:
            x = block(x)
        return x


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
