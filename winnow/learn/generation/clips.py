"""Clips of one moving shape, and what is measured of frames.

Frames are latents, 8 × 8 cells of three numbers. A shape of one colour moves on a ground of another by two cells a
frame, and comes in again on the other side. Now and then there is a cut: it goes on from another place in another
direction, so that earlier frames say how it looks and not where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SIDE, COLORS = 8, 3
CUTS = 0.08  # chance of a cut at each frame
MATTER = 0.8  # the first number of a cell says whether there is a shape; the others are its colour, or the ground's
TEST = 1 << 48  # the first seed of clips that nobody is trained on

_SHAPES = torch.tensor(
    [
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]],
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    ],
    dtype=torch.float32,
)
_STEPS = ((0, 2), (2, 0), (0, -2), (-2, 0))


@dataclass(frozen=True)
class Clip:
    """A clip, or several with an axis in front.

    Attributes:
        frames: `[t, 8, 8, 3]`.
        ground: `[3]` the colour behind the shape.
        shown: `[t, 8, 8]` 1 where the shape is.
        known: `[t]` whether the frames before say what this one is: three frames on there was no cut.
    """

    frames: Tensor
    ground: Tensor
    shown: Tensor
    known: Tensor

    @staticmethod
    def stack(clips: list[Clip]) -> Clip:
        return Clip(*(torch.stack([getattr(clip, name) for clip in clips]) for name in Clip.__annotations__))


def clip(seed: int, frames: int, cuts: float = CUTS) -> Clip:
    """The clip of a seed."""
    g = torch.Generator().manual_seed(seed)

    def among(n: int) -> int:
        return int(torch.randint(n, (1,), generator=g))

    def color(matter: float) -> Tensor:
        return torch.cat([torch.tensor([matter]), torch.rand(COLORS - 1, generator=g) * 1.6 - 0.8])

    ground, own = color(-MATTER), color(MATTER)
    mask = torch.zeros(SIDE, SIDE)
    mask[:4, :4] = _SHAPES[among(len(_SHAPES))]
    row, col, way, since = among(SIDE), among(SIDE), among(len(_STEPS)), 0
    shown, known = [], []
    for number in range(frames):
        if number and float(torch.rand(1, generator=g)) < cuts:
            row, col, way, since = among(SIDE), among(SIDE), among(len(_STEPS)), 0
        elif number:
            row, col, since = row + _STEPS[way][0], col + _STEPS[way][1], since + 1
        shown.append(mask.roll((row, col), (0, 1)))
        known.append(since > 1)
    where = torch.stack(shown)
    return Clip(where[..., None] * own + (1 - where[..., None]) * ground, ground, where, torch.tensor(known))


def spoiled(
    frames: Float[Tensor, "b t 8 8 3"], ground: Float[Tensor, "b 3"], generator: torch.Generator
) -> Float[Tensor, "b t 8 8 3"]:
    """Clips as a model that errs might have written them.

    From some frame on colours wander, noise comes in, and now and then the shape is not there.
    """
    b, t = frames.shape[:2]

    def size(most: float) -> Tensor:
        return most * torch.rand(b, 1, 1, 1, 1, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    later = _later(b, t, generator)
    wander = ((normal(b, t, 1, 1, COLORS) * size(0.06) + normal(b, 1, 1, 1, COLORS) * size(0.04)) * later).cumsum(1)
    gain = (1 + 0.03 * normal(b, 1, 1, 1, 1) * later).cumprod(1)
    gone = (torch.rand(b, t, 1, 1, 1, generator=generator) < 0.05) * later
    seen = torch.lerp(frames, ground[:, None, None, None].expand_as(frames), gone)
    return seen * gain + wander + normal(*frames.shape) * size(0.1) * later


def written(
    frames: Float[Tensor, "b t 8 8 3"], said: Float[Tensor, "b t 8 8 3"], generator: torch.Generator
) -> Float[Tensor, "b t 8 8 3"]:
    """Clips whose later frames are what a model said would follow."""
    own = torch.cat([frames[:, :1], said[:, :-1]], 1)
    b, t = frames.shape[:2]
    return torch.lerp(frames, own, _later(b, t, generator))


def _later(b: int, t: int, generator: torch.Generator) -> Float[Tensor, "b t 1 1 1"]:
    start = torch.randint(3, 9, (b, 1), generator=generator)
    return (torch.arange(t) >= start).float()[..., None, None, None]


def look(frames: Float[Tensor, "b t 8 8 3"]) -> Float[Tensor, "b t 6"]:
    """What stays the same in a clip wherever the shape is: mean and spread of each colour."""
    cells = frames.flatten(2, 3)
    return torch.cat([cells.mean(2), cells.std(2)], -1)


def drift(frames: Float[Tensor, "b t 8 8 3"], late: int) -> Float[Tensor, " b"]:
    """How far the look of the frames from `late` on is from that of the first."""
    own = look(frames)
    return (own[:, late:] - own[:, :1]).abs().mean((1, 2))


def motion(frames: Float[Tensor, "b t 8 8 3"], late: int) -> Float[Tensor, " b"]:
    """How much neighbouring frames differ; 0 where the picture stands still."""
    return frames[:, late:].diff(dim=1).abs().mean((1, 2, 3, 4))


def distance(frames: Float[Tensor, "b t 8 8 3"], clips: Clip) -> Float[Tensor, "b t"]:
    """Mean square distance of each frame from the nearest one that the clip could show, wherever its shape might be."""
    first = clips.frames[:, 0]
    places = [first.roll((row, col), (1, 2)) for row in range(SIDE) for col in range(SIDE)]
    return torch.stack([(frames - own[:, None]).square().mean((2, 3, 4)) for own in places]).amin(0)
