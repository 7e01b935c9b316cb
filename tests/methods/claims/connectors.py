"""Claims of learned connectors for videos: on the model that they are trained for, and clips that are new to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from tests.methods.directional import Sample
from winnow.learn.connectors import compared as beside
from winnow.learn.connectors import trainable
from winnow.learn.connectors.clips import Frozen
from winnow.learn.connectors.fit import recipe_of
from winnow.learn.fitting import Record

from .finding import Finding, compared

PER_TYPE = 20  # questions of each type that the model has learned


@functools.cache
def asked() -> tuple[Frozen, list[Record]]:
    frozen = Frozen()
    return frozen, beside.test_records(frozen, PER_TYPE)


def of_method(slug: str) -> Callable[[Sample, Sample], Iterator[Finding]]:
    def claims(s: Sample, rolled: Sample) -> Iterator[Finding]:
        frozen, records = asked()
        found = beside.compared(recipe_of(slug)(frozen), records)
        what = f"{found.tokens:.0f} tokens of a clip's 72, {len(found.trained)} questions, right"
        trained, untrained, frames = (
            np.array(marks, dtype=float) for marks in (found.trained, found.untrained, found.frames)
        )
        claim = "trained weights answer more than untrained ones"
        yield compared(slug, claim, what, ("trained", "untrained"), trained, untrained)
        claim = "it answers more than as many tokens of fewer frames"
        yield compared(slug, claim, what, ("trained", f"{found.frame_tokens} tokens of frames"), trained, frames)

    return claims


CLAIMS = {slug: of_method(slug) for slug in trainable()}
