"""A small detector for several cameras whose blocks route tokens as ToC3D does: slow for salient ones, fast for others.

It is made for the drives of `winnow.world.streets` and nothing else: a window transformer on all cameras and a head
that reads each token. Unlike the detector of the paper it has no memory of its own: what was found a moment ago only
says where to look. Each object is found by the token that shows its centre.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from winnow.learn.detection.blocks import PATCH, SIDE, TOKENS, WINDOW, Backbone, Block, Patches, routed
from winnow.parts.history import MotionQueries, QueryScores, TokenScores, waves
from winnow.world.streets import CAMERAS, FARTHEST, FOCAL, HEIGHT, KINDS

SELECTORS = (1, 3)  # blocks that score tokens; not those that see a whole camera
WHOLE = (2, 5)  # blocks whose windows are whole cameras
RATIOS = (0.5, 0.3)  # of each window, from each selector on
RARE = 4.0  # logits of kinds begin that far below 0, as few tokens have an object
VALUES = 4  # of an object beside its kind: column and row of its centre, log of its depth, log of its size


@dataclass(frozen=True)
class Memory:
    """What was found a moment ago, in the frame of the vehicle of then. Nothing of it has gradients.

    Attributes:
        content: `[B, Q, C]` what the tokens were.
        points, velocity: `[B, Q, 3]`, `[B, Q, 2]`.
        pose: `[B, 3, 4]` from the frame of then to that of now.
        elapsed: `[B]` seconds.
    """

    content: Tensor
    points: Tensor
    velocity: Tensor
    pose: Tensor
    elapsed: Tensor


@dataclass(frozen=True)
class Found:
    """What a frame gives.

    Attributes:
        kinds: `[B, N, K]` logits.
        values: `[B, N, 4]`, see `VALUES`.
        features: `[B, N, C]` the tokens, the whole grid.
        scores: for each selector `[B, N, 2]` logarithms of being salient or not.
        entering: for each selector `[B, N, C]` the tokens that it saw.
    """

    kinds: Tensor
    values: Tensor
    features: Tensor
    scores: tuple[Tensor, ...]
    entering: tuple[Tensor, ...]


class Detector(nn.Module):
    """Objects around a vehicle from its four cameras.

    Args:
        width, depth, heads: of its own blocks.
        queries: found objects that are remembered.
        backbone: in the place of its own blocks.
    """

    rays: Tensor

    def __init__(
        self, width: int = 64, depth: int = 6, heads: int = 4, queries: int = 16, backbone: Backbone | None = None
    ) -> None:
        super().__init__()
        self.queries = queries
        width = width if backbone is None else backbone.width
        self.patch = Patches(3 * PATCH**2, width) if backbone is None else backbone.patch
        rays = waves(torch.stack(directions(), -1) / 2)
        self.register_buffer("rays", rays, persistent=False)
        self.ray = nn.Linear(rays.shape[-1], width)
        own = (Block(width, heads, SIDE if i in WHOLE else WINDOW) for i in range(depth))
        self.blocks = nn.ModuleList(own) if backbone is None else backbone.blocks
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, len(KINDS) + VALUES))
        self.motion = MotionQueries(width, FARTHEST)
        self.remember = nn.Linear(width, width)
        self.by_history = nn.ModuleList(QueryScores(width, width, queries) for _ in SELECTORS)
        self.by_token = nn.ModuleList(TokenScores(width) for _ in SELECTORS)

    def forward(
        self,
        images: Float[Tensor, "b cameras h w 3"],
        memory: Memory | None = None,
        ratios: tuple[float, ...] | None = RATIOS,
        *,
        generator: torch.Generator | None = None,
        legacy: bool = False,
    ) -> Found:
        """Read one moment.

        Args:
            images: 0 … 1.
            memory: of the moment before; without one, tokens are scored by themselves.
            ratios: shares of a window that go the slow path behind each selector; None is the plain detector.
            generator: of the noise in masks while training; without one, masks are the probabilities.
            legacy: see `slow_fast`.
        """
        x = self.patch(images) + self.ray(self.rays)
        queries = None if memory is None else self._queries(memory)
        mask, keep = x.new_ones(x.shape[:2]), 1.0
        scores: list[Tensor] = []
        entering: list[Tensor] = []
        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            if number in SELECTORS and ratios is not None:
                stage = SELECTORS.index(number)
                judge = self.by_token[stage] if queries is None else self.by_history[stage]
                seen = (x, mask) if queries is None else (x, queries, mask)
                entering.append(x)
                scores.append(judge(*seen))
                mask = mask * (chances(scores[-1], generator) if generator else scores[-1].exp())[..., 0]
                keep = ratios[stage]
            x = routed(block, x, scores[-1][..., 0] if scores else None, keep, legacy)
        features = self.norm(x)
        said = self.head(features)
        kinds, values = said[..., : len(KINDS)] - RARE, said[..., len(KINDS) :]
        return Found(kinds, values, features, tuple(scores), tuple(entering))

    def _queries(self, memory: Memory) -> Float[Tensor, "b q c"]:
        content = self.remember(layer_norm(memory.content, memory.content.shape[-1:]))
        return self.motion(content, memory.points, memory.velocity, memory.elapsed, memory.pose)

    @torch.no_grad()
    def memory(self, found: Found, pose: Float[Tensor, "b 3 4"], elapsed: Float[Tensor, " b"]) -> Memory:
        """The surest finds. One frame shows no velocity, so that it is 0; the pose is where they go from here."""
        best = found.kinds.amax(-1).topk(self.queries, 1).indices[..., None]
        points = centers(found.values).gather(1, best.expand(-1, -1, 3))
        content = found.features.gather(1, best.expand(-1, -1, found.features.shape[-1]))
        return Memory(content, points, points.new_zeros(*points.shape[:2], 2), pose, elapsed)


def chances(score: Float[Tensor, "b n 2"], generator: torch.Generator) -> Float[Tensor, "b n 2"]:
    """A soft sample, by Gumbel's noise from a generator of one's own."""
    noise = torch.rand(score.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return (score - (-noise.log()).log().to(score.device)).softmax(-1)


def directions() -> tuple[Tensor, Tensor]:
    """Azimuth and elevation of each token's centre, in halves of the circle."""
    middle = (torch.arange(SIDE) + 0.5) * PATCH
    row, col = torch.meshgrid(middle, middle, indexing="ij")
    turn = torch.arange(CAMERAS)[:, None, None] * math.pi / 2
    azimuth = (turn - ((col - FOCAL) / FOCAL).atan() + math.pi) % (2 * math.pi) - math.pi
    elevation = ((FOCAL - row) / FOCAL).atan().expand_as(azimuth)
    return azimuth.flatten() / math.pi, elevation.flatten() / math.pi


def centers(values: Float[Tensor, "b n 4"]) -> Float[Tensor, "b n 3"]:
    """The points that tokens speak of, in the frame of the vehicle."""
    grid = torch.arange(TOKENS, device=values.device)
    camera, row, col = grid // SIDE**2, grid // SIDE % SIDE, grid % SIDE
    depth = values[..., 2].clamp(-1, 4).exp()
    right = ((col + values[..., 0]) * PATCH - FOCAL) / FOCAL * depth
    up = (FOCAL - (row + values[..., 1]) * PATCH) / FOCAL * depth
    angle = camera * (math.pi / 2)
    x = depth * angle.cos() + right * angle.sin()
    y = depth * angle.sin() - right * angle.cos()
    return torch.stack([x, y, up + HEIGHT], -1)
