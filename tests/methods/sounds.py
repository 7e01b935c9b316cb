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


def runs(reduction: Reduction) -> list[list[int]]:
    """The sources of each output of the first item."""
    lane = reduction.lane(0)
    return [(row != 0).nonzero()[:, 0].tolist() for row in lane.to_matrix()]


def crossed(reduction: Reduction, changes: list[int]) -> int:
    """How many changes lie inside an output."""
    return sum(any(run[0] < at <= run[-1] for run in runs(reduction)) for at in changes)
