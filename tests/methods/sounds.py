"""Sounds of the drawn world as methods see them: mel tokens of 40 ms, and where tones change and evidence lies."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.view import View
from winnow.world.sounds import Sound, mel_tokens, sound

EACH = 0.04  # seconds of a token


class Heard(NamedTuple):
    """A sound as tokens.

    Attributes:
        sound: as it was made.
        view: of its mel tokens, less their mean over the sound.
        evidence: `[N]` which tokens the answer to its question depends on.
    """

    sound: Sound
    view: View
    evidence: Tensor

    @property
    def changes(self) -> list[int]:
        """The tokens with which an event begins, or behind which one ends: what lies before such a one differs."""
        edges = {round(t / EACH) for event in self.sound.events for t in event.span}
        return sorted(t for t in edges if 0 < t < self.view.n)


@functools.cache
def heard(seed: int, kind: str) -> Heard:
    made = sound(seed, kind)
    x = torch.from_numpy(mel_tokens(made.wave)).float()
    layout = Layout.sound(len(x), EACH)
    evidence = np.zeros(len(x), dtype=bool)
    for question in made.questions:
        evidence |= layout.covering(question.boxes(layout.seconds or 0.0))
    return Heard(made, View.of((x - x.mean(0))[None], layout=layout), torch.from_numpy(evidence))


class Filmed(NamedTuple):
    """A clip that a sound belongs to.

    Attributes:
        view: of its tokens; signals are how loud the sound is.
        things: the tokens of what is seen while the question's event is heard.
    """

    view: View
    things: Tensor


@functools.cache
def filmed(seed: int, frames: int = 20, side: int = 6, width: int = 32) -> Filmed:
    """Frames over a still background, in which a quarter of the places is always new, heard or not."""
    one, generator = heard(seed, "events"), torch.Generator().manual_seed(seed)
    places = side * side
    x = torch.randn(1, places, width, generator=generator) + 0.1 * torch.randn(
        frames, places, width, generator=generator
    )
    busy = torch.randperm(places, generator=generator)[: places // 4]
    x[:, busy] = torch.randn(frames, len(busy), width, generator=generator)
    at = one.evidence.nonzero()[:, 0] * frames // one.view.n
    things = torch.zeros(frames, places, dtype=torch.bool)
    for frame in at.unique().tolist():
        corner = int(torch.randint(places - 4, (1,), generator=generator))
        things[frame, corner : corner + 4] = True
    x[things] = torch.randn(int(things.sum()), width, generator=generator)
    level = one.view.tokens[0].mean(-1)
    loud = (level - level.min())[None]
    return Filmed(View.of(x.flatten(0, 1)[None], loud, layout=Layout.grid(side, side, frames)), things.flatten())


def left_of(reduction: Reduction, one: Filmed) -> float:
    """The share of the things that is kept."""
    return float(one.things[reduction.lane(0).representatives].sum() / one.things.sum())


def runs(reduction: Reduction) -> list[list[int]]:
    """The sources of each output of the first item."""
    lane = reduction.lane(0)
    return [(row != 0).nonzero()[:, 0].tolist() for row in lane.to_matrix()]


def crossed(reduction: Reduction, changes: list[int]) -> int:
    """How many changes lie inside an output."""
    return sum(any(run[0] < at <= run[-1] for run in runs(reduction)) for at in changes)
