"""A trained connector beside its untrained self, beside fewer frames of as many tokens, and beside the whole clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from winnow.bench.intervals import Paired, paired
from winnow.learn.clip_evaluate import draw_sample, whole_seconds
from winnow.learn.connectors.clips import GRID, LEARNED, Frozen, Row, rows_of
from winnow.learn.connectors.output import Output
from winnow.learn.connectors.recipe import Recipe, right_of
from winnow.learn.fitting import Record
from winnow.parts.learned import untrained

FIRST_TEST = 1 << 20  # the model's card and the benchmark ask about clips of lower seeds


@dataclass(frozen=True)
class Compared:
    """Which of the same questions are answered right.

    Attributes:
        name: of the method, as a plan.
        tokens: of a clip, in the mean, behind the connector.
        frame_tokens: of the whole seconds, evenly spaced, that hold at least as many.
    """

    name: str
    tokens: float
    frame_tokens: int
    trained: Sequence[bool]
    untrained: Sequence[bool]
    frames: Sequence[bool]
    plain: Sequence[bool]

    @cached_property
    def over_untrained(self) -> Paired:
        return paired(self.untrained, self.trained)

    @cached_property
    def over_frames(self) -> Paired:
        return paired(self.frames, self.trained)


def test_records(frozen: Frozen, per_type: int) -> list[Record]:
    """Clips of the split `test` with as many questions of each type that the model has learned."""
    sample = draw_sample(per_type, split="test", seed=FIRST_TEST, types=LEARNED)
    return [frozen.record(seen, own) for seen, own in zip(sample.clips, sample.questions, strict=True)]


def compared(recipe: Recipe, records: Sequence[Record], weights: str | None = None, seed: int = 0) -> Compared:
    """A connector on clips that it was not trained on.

    Args:
        weights: a file that `winnow train` wrote; None: those that winnow ships.
        seed: of the untrained module.
    """
    frozen = recipe.frozen

    def right(module: nn.Module) -> tuple[list[bool], float]:
        return right_of(frozen, rows_of(records, recipe.asks), lambda own: recipe.outputs(module.eval(), own))

    trained, tokens = right(recipe.method.replace(weights=weights).build(frozen.info))
    plain, frames = whole(frozen, records), fewer_frames(frozen, records, seconds := seconds_of(tokens))
    fresh, _ = right(untrained(recipe.make, seed))
    return Compared(recipe.name or recipe.slug, tokens, seconds * GRID[1], trained, fresh, frames, plain)


def seconds_of(tokens: float) -> int:
    """Whole seconds with at least so many tokens."""
    return min(GRID[0], max(1, math.ceil(tokens / GRID[1])))


def whole(frozen: Frozen, records: Sequence[Record]) -> list[bool]:
    """Which questions are answered behind all tokens."""
    return fewer_frames(frozen, records, GRID[0])


def fewer_frames(frozen: Frozen, records: Sequence[Record], seconds: int) -> list[bool]:
    """Which questions are answered behind the tokens of so many seconds, evenly spaced, at their own positions."""
    chosen = torch.tensor(whole_seconds(*GRID, seconds))

    def give(rows: Sequence[Row]) -> Output:
        return Output(torch.stack([row.tokens[chosen] for row in rows]), chosen.expand(len(rows), -1))

    return right_of(frozen, rows_of(records, asks=False), give)[0]
