"""Indices at equal distances, beside fractions; and a thumbnail, beside a loop over its pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.parts.evenly import evenly, evenly_naive
from winnow.parts.thumbnail import grid_of, thumbnail_naive, thumbnail_of


@given(st.integers(1, 400), st.data())
def test_indices_are_those_of_fractions(n, data):
    count = data.draw(st.integers(1, n))
    found = evenly(n, count).tolist()
    assert found == evenly_naive(n, count)
    assert found[0] == 0
    assert count == 1 or found[-1] == n - 1
    assert len(set(found)) == count


@given(st.integers(1, 60000), st.data())
def test_as_floats_they_are_a_linspace_rounded_and_never_the_same_twice(n, data):
    count = data.draw(st.integers(1, n))
    code = torch.linspace(0, n - 1, count).round().long()
    found = evenly(n, count, floats=True)
    assert bool((found.diff() > 0).all())
    assert torch.equal(found, code) or bool((code.diff() <= 0).any())


def test_floats_take_another_neighbour_of_a_half():
    assert int((evenly(50 * 576, 2880, floats=True) != evenly(50 * 576, 2880)).sum()) == 1


@pytest.mark.parametrize(
    ("count", "grid"), [(1, (1, 1)), (4, (2, 2)), (6, (3, 2)), (8, (4, 2)), (5, (5, 1)), (12, (4, 3))]
)
def test_the_grid_has_no_fewer_rows_than_columns(count, grid):
    assert grid_of(count) == grid


@pytest.mark.system("ts-llava", "exact")
@pytest.mark.parametrize(
    ("t", "count", "h", "w"), [(6, 6, 12, 8), (9, 4, 10, 6), (8, 8, 13, 9), (5, 5, 11, 4), (3, 1, 4, 4)]
)
def test_a_thumbnail_is_frames_at_equal_distances_made_smaller(t, count, h, w):
    frames = torch.rand(t, 3, h, w, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(thumbnail_of(frames, count), torch.tensor(thumbnail_naive(frames, count)), atol=1e-5)


def test_more_frames_than_there_are_or_than_fit_are_refused():
    with pytest.raises(WinnowError, match="thumbnail of 6 frames"):
        thumbnail_of(torch.zeros(5, 3, 8, 8))
    with pytest.raises(WinnowError, match="smaller than a grid"):
        thumbnail_of(torch.zeros(8, 3, 2, 8), 6)
