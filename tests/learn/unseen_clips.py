"""Trained connectors on questions about clips that nobody was trained on; the clips are encoded once for all tests."""

from __future__ import annotations

import functools

from winnow.learn.connectors import compared
from winnow.learn.connectors.clips import Frozen
from winnow.learn.connectors.fit import recipe_of

EACH = 20  # questions of a type


@functools.cache
def frozen() -> Frozen:
    return Frozen()


@functools.cache
def records():
    return compared.test_records(frozen(), EACH)


def beside_untrained(slug: str) -> compared.Compared:
    """The shipped weights of a connector beside random ones."""
    return compared.compared(recipe_of(slug)(frozen()), records())
