"""Clips from a seed, and the evidence of a question as tokens of a model see it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from winnow.core.errors import WinnowError
from winnow.world.clips.draw import Stage
from winnow.world.clips.names import FPS, FRAMES, SIDES, SPLITS, TYPES
from winnow.world.clips.questions import ask
from winnow.world.clips.records import Clip, Sight
from winnow.world.clips.story import ClipSpec, tell

VERSION = 1  # of the generator: the same version, seed, frames and side give the same bytes
SEEDS_PER_SPLIT = 1 << 48

Stretch = tuple[float, float, float, float, float, float]  # x0, y0, x1, y1, t0, t1 as fractions


def clip(
    seed: int,
    frames: int = 16,
    side: int = 84,
    split: str = "train",
    spec: ClipSpec | None = None,
    per_type: int = 1,
    types: Sequence[str] = TYPES,
) -> Clip:
    """Draw the clip of a seed and ask about it: two frames a second, events at whole seconds.

    Each split has 2^48 seeds of its own, so no clip is in two splits. In long clips as much happens as in short ones,
    so most of a long clip stands still. `per_type` bounds the questions of one type.
    """
    stage, rng = staged(seed, frames, side, split, spec)
    unknown = sorted(set(types) - set(TYPES))
    if unknown:
        raise WinnowError(f"unknown question types {', '.join(unknown)}; the types are {', '.join(TYPES)}")
    questions = ask(stage.story, frames // FPS, side, rng, per_type, types)
    return Clip(seed, side, split, stage.draw(range(frames)), stage.story.tracks, stage.story.cuts, questions)


def staged(
    seed: int, frames: int = 16, side: int = 84, split: str = "train", spec: ClipSpec | None = None
) -> tuple[Stage, random.Random]:
    """A clip that is not drawn yet, and the generator to ask about it with."""
    if split not in SPLITS:
        raise WinnowError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if side not in SIDES:
        raise WinnowError(f"a clip of {side} pixels was asked for; the sides are {', '.join(map(str, SIDES))}")
    if not (FRAMES[0] <= frames <= FRAMES[1] and frames % FPS == 0):
        raise WinnowError(f"a clip of {frames} frames was asked for; take an even number of {FRAMES[0]} … {FRAMES[1]}")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise WinnowError(f"seed {seed} is outside 0 … {SEEDS_PER_SPLIT - 1}")
    rng = random.Random(f"clip {SPLITS.index(split) * SEEDS_PER_SPLIT + seed}")
    story = tell(rng, frames // FPS, side, spec or ClipSpec())
    return Stage(rng, story, frames, side), rng


def stretches(evidence: Sequence[Sight], side: int, frames: int) -> list[Stretch]:
    """Sights as fractions of the picture and of the clip, as `winnow.core.layout.Layout.covering` takes them."""
    return [
        (box.x0 / side, box.y0 / side, box.x1 / side, box.y1 / side, frame / frames, (frame + 1) / frames)
        for frame, box in evidence
    ]
