"""Learned connectors on clips that they were not trained on, encoded once for all tests (`xdist_group("clips")`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from winnow.learn.connectors import compared
from winnow.learn.connectors.clips import Frozen, Row, rows_of
from winnow.learn.connectors.fit import recipe_of
from winnow.learn.connectors.recipe import Recipe, right_of
from winnow.learn.fitting import Record

PER_TYPE = 10


@cache
def frozen() -> Frozen:
    torch.set_num_threads(1)
    return Frozen()


@cache
def records() -> list[Record]:
    return compared.test_records(frozen(), PER_TYPE)


def rows(slug: str) -> list[Row]:
    return rows_of(records(), recipe_of(slug)(frozen()).asks)


def with_settings(slug: str, **settings: Any) -> tuple[Recipe, Any]:
    """The recipe of a method with some settings changed, and its trained module."""
    recipe = recipe_of(slug)(frozen())
    recipe.method = recipe.method.replace(**{"weights": None, **settings})
    (recipe.step,) = recipe.method.bind(frozen().info)[1]
    return recipe, recipe.method.build(frozen().info).eval()


@cache
def right(slug: str, **settings: Any) -> Sequence[bool]:
    """Which questions are answered right behind the trained method, with some settings changed."""
    recipe, module = with_settings(slug, **settings)
    return right_of(frozen(), rows(slug), lambda own: recipe.outputs(module, own))[0]
