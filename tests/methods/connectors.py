"""Shipped connectors on the video reference model: clips that nobody has seen, drawn once for all tests."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from winnow.learn.clip_evaluate import layout_of
from winnow.learn.connectors.clips import Frozen, Row, rows_of
from winnow.learn.connectors.compared import Compared, compared, test_records
from winnow.learn.connectors.fit import recipe_of
from winnow.world.clips import clip, stretches

PER_TYPE = 24
FIRST = 1 << 21  # seeds of other clips than those of the tables
POINTED = ("color", "cause", "when", "needle")  # their evidence is a few tokens


@functools.cache
def frozen() -> Frozen:
    torch.set_num_threads(1)
    return Frozen()


@functools.cache
def of_method(slug: str, **settings: Any) -> Compared:
    """A connector with its shipped weights, beside its untrained self and whole seconds of as many tokens.

    Args:
        settings: others than those for which its weights are.
    """
    return compared(recipe_of(slug).at(**settings)(frozen()), _records())


@functools.cache
def _records() -> list[dict[str, torch.Tensor]]:
    return test_records(frozen(), PER_TYPE)


@functools.cache
def with_evidence(count: int = 40) -> list[tuple[Row, np.ndarray]]:
    """Clips with a question about each, and which of the tokens its answer depends on."""
    found: list[tuple[Row, np.ndarray]] = []
    for number in range(FIRST, FIRST + 20 * count):
        seen = clip(number, split="test", types=POINTED)
        for question in seen.questions[:1]:
            mask = layout_of(seen).covering(stretches(question.evidence, seen.side, seen.frames))
            found += [(row, mask) for row in rows_of([frozen().record(seen, [question])], asks=True)]
        if len(found) == count:
            return found
    raise AssertionError(f"{len(found)} clips have a question with evidence")
