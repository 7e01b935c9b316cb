"""A small model that writes the next frame of a clip, and the cache that it reads while it does.

A transformer whose tokens are 2 × 2 cells. A token enters with its neighbours and with what was there a frame ago,
which show how things move; attention to earlier frames is left to say how they look. Rotations say when a token is, and
in which row and column.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from winnow.cache.groups import Group
from winnow.cache.memory import Memory
from winnow.cache.rotary import Rotary
from winnow.core.info import ModelInfo
from winnow.core.kv import KVStep, KVView
from winnow.core.kv_method import CacheMethod
from winnow.core.step import KVReduce, Repose
from winnow.learn.generation.clips import COLORS, SIDE

PATCH = 2
GRID = SIDE // PATCH
TOKENS = GRID**2  # of a frame
TIME = 4  # pairs of a head that turn with time
ROTARY = Rotary(
    torch.tensor([100.0 ** (-i / TIME) for i in range(TIME)] + [math.pi / 2, math.pi] * 2), interleaved=True
)
IN_TIME = ROTARY.only(range(TIME))


class FrameCache:
    """What one layer has read, shortened by the steps of a cache method behind each frame.

    Args:
        steps: of this layer.
    """

    def __init__(self, steps: tuple[KVStep, ...] = ()) -> None:
        self.steps, self.memory, self.seen = steps, Memory(), 0
        self.held: tuple[Tensor, ...] = ()
        self.queries: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take the keys and values of a frame, and give all."""
        new = keys.shape[2]
        slots = torch.arange(self.seen, self.seen + new).expand(keys.shape[:3])
        given = (keys, values, slots)
        self.held = tuple(torch.cat(pair, 2) for pair in zip(self.held, given, strict=True)) if self.held else given
        self.seen += new
        return self.held[0], self.held[1]

    def settle(self, queries: Tensor) -> None:
        """Let the steps act, once a frame has been attended."""
        known = queries if self.queries is None else torch.cat([self.queries, queries], 2)
        rows = max([queries.shape[2], *(step.recent for step in self.steps)])
        self.queries = known[:, :, -rows:]
        group = Group(tuple(range(queries.shape[0])))
        for step in self.steps:
            keys, values, slots = self.held
            seen = self.queries[:, :, -keys.shape[2] :]
            view = KVView.of(keys, values, seen, slots=slots, seen=self.seen, fresh=TOKENS, rotary=IN_TIME)
            action, state = step.act(view, self.memory.of(0, group, view.n))
            self.memory.put(0, group, state)
            if isinstance(action, KVReduce):
                at = action.k.representatives
                self.memory.reduce([0], group, at, action.v)
                self.held = action.k.apply(keys), action.v.apply(values), slots.gather(2, at)
            elif isinstance(action, Repose):
                own = keys if action.keys is None else action.keys
                self.held = view.turned(own, action.positions), values, slots


class Block(nn.Module):
    """A transformer block; rotations of queries and keys are added by what knows where tokens are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, turned: Any, mask: Tensor | None, cache: FrameCache | None) -> Tensor:
        q, k, v = self.qkv(self.first(x)).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = turned(q), turned(k)
        keys, values = (k, v) if cache is None else cache.add(k, v)
        x = x + self.out(scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2).flatten(2))
        if cache is not None:
            cache.settle(q)
        return x + self.mlp(self.second(x))


class FrameWriter(nn.Module):
    """Says for each frame which one follows."""

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(2 * 9 * COLORS * PATCH**2, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, COLORS * PATCH**2)

    def forward(
        self,
        frames: Float[Tensor, "b t 8 8 3"],
        start: int = 0,
        caches: list[FrameCache] | None = None,
        before: Float[Tensor, "b 8 8 3"] | None = None,
    ) -> Float[Tensor, "b t 8 8 3"]:
        """The frames that follow.

        Args:
            start: when the first of these frames is.
            caches: of each block, with what was read before; these frames are then one.
            before: the frame before the first; None where there is none.
        """
        t = frames.shape[1]
        turned = _turns(torch.arange(start, start + t))
        mask = None
        if caches is None:
            when = torch.arange(t * TOKENS) // TOKENS
            mask = when[:, None] >= when
        first = frames[:, 0] if before is None else before
        x = self.enter(torch.cat([around(frames), around(torch.cat([first[:, None], frames[:, :-1]], 1))], 2))
        for number, block in enumerate(self.blocks):
            x = block(x, turned, mask, None if caches is None else caches[number])
        return pixels(self.leave(self.norm(x)))

    @torch.no_grad()
    def write(
        self, frames: Float[Tensor, "b p 8 8 3"], total: int, method: CacheMethod | None = None
    ) -> Float[Tensor, "b t 8 8 3"]:
        """Go on from some frames, one by one.

        Args:
            total: frames, the given ones among them.
            method: of the cache, in which a frame has 16 tokens; without one, all frames are read for ever.
        """
        steps = () if method is None else method.steps(ModelInfo(depth=len(self.blocks)))
        caches = [FrameCache(tuple(s for s in steps if s.at.index == k)) for k in range(len(self.blocks))]
        made = list(frames.unbind(1))
        for number in range(total - 1):
            said = self(made[number][:, None], number, caches, made[number - 1] if number else None)[:, 0]
            if number + 1 == len(made):
                made.append(said)
        return torch.stack(made, 1)


def _turns(times: Int[Tensor, " t"]) -> Any:
    """What gives queries or keys `[b, h, t·16, d]` of frames at these times their phase."""
    cell = torch.arange(TOKENS)
    places = torch.stack([cell // GRID] * 2 + [cell % GRID] * 2, 1)
    at = torch.cat([times[:, None, None].expand(-1, TOKENS, TIME), places.expand(len(times), -1, -1)], 2)
    angles = at.flatten(0, 1) * ROTARY.frequencies
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    return turned


def tokens(frames: Float[Tensor, "b t 8 8 3"]) -> Float[Tensor, "b n p"]:
    parts = frames.unflatten(2, (GRID, PATCH)).unflatten(4, (GRID, PATCH))
    return parts.permute(0, 1, 2, 4, 3, 5, 6).flatten(4).flatten(1, 3)


def around(frames: Float[Tensor, "b t 8 8 3"]) -> Float[Tensor, "b n q"]:
    """Each token with its eight neighbours; the first row is below the last one, and so on."""
    steps = (-PATCH, 0, PATCH)
    return torch.cat([tokens(frames.roll((row, col), (2, 3))) for row in steps for col in steps], 2)


def pixels(x: Float[Tensor, "b n p"]) -> Float[Tensor, "b t 8 8 3"]:
    parts = x.unflatten(1, (-1, GRID, GRID)).unflatten(4, (PATCH, PATCH, COLORS))
    return parts.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
