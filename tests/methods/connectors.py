"""Trained connectors on the video reference model: clips that nobody has seen, and answers, made once for all tests."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from winnow.learn.connectors.clips import Frozen, Row, rows_of
from winnow.learn.connectors.compared import Compared, compared, test_records
from winnow.learn.connectors.fit import recipe_of
from winnow.world.clips import Clip, clip

PER_TYPE = 12


@functools.cache
def frozen() -> Frozen:
    torch.set_num_threads(1)
    return Frozen()


@functools.cache
def records() -> list[dict[str, torch.Tensor]]:
    return test_records(frozen(), PER_TYPE)


@functools.cache
def of_method(slug: str) -> Compared:
    """A shipped connector beside its untrained self and beside as many tokens of whole seconds."""
    return compared(recipe_of(slug)(frozen()), records())


def rows(asks: bool = True) -> list[Row]:
    return rows_of(records(), asks)


def with_evidence(kinds: tuple[str, ...], count: int) -> list[tuple[Clip, Any, np.ndarray]]:
    """Clips of the split `test`, a question about each, and which of its tokens the answer depends on."""
    from winnow.learn.clip_evaluate import layout_of
    from winnow.world.clips import stretches

    found: list[tuple[Clip, Any, np.ndarray]] = []
    number = 1 << 21
    while len(found) < count:
        seen = clip(number, split="test", types=kinds)
        number += 1
        for question in seen.questions[:1]:
            mask = layout_of(seen).covering(stretches(question.evidence, seen.side, seen.frames))
            if question.evidence:
                found.append((seen, question, mask))
    return found
