"""Recipes of FitPrune: counts on any number of tokens and any depth."""

from __future__ import annotations

import pytest

from winnow.parts.recipes import RECIPES, Recipe

SMALL = Recipe(10, (1, 0, 4, 2))


def test_each_layer_drops_its_share_rounded_down():
    assert [SMALL.left(10, done) for done in range(5)] == [10, 9, 9, 5, 3]
    assert [SMALL.left(19, done) for done in range(5)] == [19, 18, 18, 11, 8]
    assert SMALL.ends_at == pytest.approx(0.3)


def test_cuts_are_where_something_is_dropped():
    assert SMALL.cuts(4) == {1: 1, 3: 3}
    assert SMALL.cuts(2) == {1: 2}
    assert SMALL.cuts(8) == {2: 1, 6: 3}
    assert SMALL.cuts(1) == {}


@pytest.mark.parametrize("n", [576, 577, 31, 1])
@pytest.mark.parametrize("end", [1, 7, 400])
def test_stretched_it_ends_where_it_is_told_to_and_never_grows(n, end):
    for own in RECIPES.values():
        for recipe in own.values():
            left = [recipe.stretched(n, done, 31, min(n, end)) for done in range(32)]
            assert (left[0], left[-1]) == (n, min(n, end))
            assert left == sorted(left, reverse=True)
