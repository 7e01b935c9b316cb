"""Budgets that fall with depth: as much in all as equal ones, never below the window, and no pyramid at β = 1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.pyramid import pyramid


@given(st.floats(0.5, 900), st.integers(1, 64), st.integers(1, 40), st.floats(1, 40), st.integers(1000, 2000))
def test_layers_hold_as_much_as_equal_ones(n, window, depth, beta, most):
    for clamp in (False, True):
        counts = pyramid(n, window, depth, beta, most, clamp=clamp)
        assert len(counts) == depth
        assert abs(sum(counts) - depth * round(n)) <= depth
        assert list(counts) == sorted(counts, reverse=True)
        if counts[0] > counts[-1] + 1:
            assert counts[-1] >= window
            assert counts[0] <= most - window


def test_an_example_by_hand():
    # n/β = 50, 2n − 50 = 1950; in 4 steps of 475
    assert pyramid(1000, 32, 5, 20, 4096) == (1950, 1475, 1000, 525, 50)
    # the first layer has at most 1500 − 32, and the last gets the rest: 2000 − 1468
    assert pyramid(1000, 32, 5, 20, 1500) == (1468, 1234, 1000, 766, 532)


@pytest.mark.parametrize("n", [3, 7.5, 100, 512, 900])
def test_beta_one_is_equal_budgets(n):
    assert pyramid(n, 8, 6, 1, 1000) == (round(n),) * 6


def test_a_last_layer_below_the_window_gets_the_window_or_ends_the_pyramid():
    assert pyramid(1228.8, 64, 32, 20, 4096, clamp=False) == (1229,) * 32
    clamped = pyramid(1228.8, 64, 32, 20, 4096)
    assert (clamped[0], clamped[-1]) == (2394, 64)
    assert pyramid(1280, 64, 32, 20, 4096, clamp=False)[-1] == 64
    assert pyramid(40, 64, 32, 20, 4096) == (40,) * 32  # no layer can have the window
    assert pyramid(40, 8, 1, 20, 64) == (40,)
