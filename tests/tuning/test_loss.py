"""Lost answers: what is counted, what is proven, and how often a claim is wrong."""

from __future__ import annotations

import random

import pytest

from winnow.core.errors import WinnowError
from winnow.tuning.loss import Loss, checked_confidence, loss_of


def loss(both: int, lost: int, gained: int, neither: int) -> Loss:
    full = [True] * (both + lost) + [False] * (gained + neither)
    return Loss(tuple(full), tuple([True] * both + [False] * lost + [True] * gained + [False] * neither))


def test_a_loss_is_what_is_lost_less_what_is_gained():
    found = loss(80, 6, 2, 12)
    assert (found.n, found.lost, found.gained) == (100, 6, 2)
    assert found.value == pytest.approx(0.04)


def test_only_questions_that_both_have_answered_are_compared():
    found = loss_of({"a": True, "b": True, "d": False}, {"a": True, "b": False, "c": False}, ["a", "b", "c", "d"])
    assert (found.full, found.mine) == ((True, True), (True, False))


def test_bounds_hold_the_estimate_and_widen_with_the_confidence():
    found = loss(800, 12, 5, 100)
    bounds = [found.at_most(c) for c in (0.5, 0.8, 0.95, 0.99)]
    assert bounds[0] == pytest.approx(found.value)
    assert bounds == sorted(bounds)
    assert found.at_least(0.95) < found.value < found.at_most(0.95)


def test_equal_answers_prove_little_with_few_questions_and_more_with_many():
    few, many = loss(20, 0, 0, 4), loss(2000, 0, 0, 400)
    assert few.at_most(0.95) > many.at_most(0.95) > 0
    assert many.at_most(0.95) < 0.005


def test_the_chance_grows_with_the_limit_and_falls_with_what_is_lost():
    assert loss(90, 1, 1, 8).chance(0.05) > loss(90, 5, 1, 4).chance(0.05) > loss(80, 16, 0, 4).chance(0.05)
    assert loss(90, 5, 1, 4).chance(0.02) < loss(90, 5, 1, 4).chance(0.05)
    assert loss(0, 0, 0, 0).chance(0.0) == pytest.approx(0.5)


def test_how_many_questions_would_be_enough():
    found = loss(380, 4, 2, 14)
    enough = found.enough(0.02, 0.95)
    assert enough is not None
    times = -(-enough // found.n) + 1
    assert loss(380 * times, 4 * times, 2 * times, 14 * times).at_most(0.95) <= 0.02
    assert loss(380, 12, 2, 6).enough(0.02, 0.95) is None, "it loses more than the limit"


@pytest.mark.parametrize("bad", [0.4, 1, 1.5, True, "95%", float("nan")])
def test_a_confidence_is_from_a_half_to_below_one(bad):
    with pytest.raises(WinnowError, match=r"from 0\.5"):
        checked_confidence(bad)


def test_a_plan_at_the_limit_is_claimed_no_more_often_than_the_confidence_allows():
    """500 draws of 600 questions of a plan that loses exactly 3 %: at 95 % one in twenty claims may be wrong."""
    rng, wrong = random.Random(0), 0
    for _ in range(500):
        drawn = rng.choices(("both", "lost", "gained", "neither"), (0.85, 0.05, 0.02, 0.08), k=600)
        found = loss(*(drawn.count(kind) for kind in ("both", "lost", "gained", "neither")))
        wrong += found.at_most(0.95) <= 0.03
    assert 5 <= wrong <= 40
