"""Questions about clips that nobody has seen, asked behind a shipped method that reads beside the sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from winnow.learn.connectors.clips import LEARNED, Row, rows_of
from winnow.learn.connectors.fit import recipe_of
from winnow.learn.connectors.output import Output
from winnow.learn.connectors.recipe import right_of
from winnow.world.clips import clip

from . import connectors

FIRST, CLIPS = 1 << 22, 24


@functools.cache
def rows() -> list[Row]:
    """Clips of the split `test`, with a question of each type about each."""
    seen = (clip(number, split="test", per_type=1, types=LEARNED) for number in range(FIRST, FIRST + CLIPS))
    return rows_of([connectors.frozen().record(own) for own in seen], asks=False)


def answered(slug: str, change: Callable[[Output], Output] = lambda output: output) -> np.ndarray:
    """The share of each clip's questions that is answered right, with what is read changed."""
    own = recipe_of(slug)(connectors.frozen())
    module = own.method.replace(weights=None).build(own.frozen.info).eval()
    marks = iter(right_of(own.frozen, rows(), lambda some: change(own.outputs(module, some)))[0])
    return np.array([np.mean([next(marks) for _ in row.asked]) for row in rows()])
