"""Smaller grids as edges, beside torch's interpolation."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.layout import Layout
from winnow.parts.frames import frame_sides
from winnow.parts.resampled import in_groups, resampled_naive, smaller
from winnow.testing import Picture


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1, 5))
def test_a_frame_is_what_torch_makes_of_it(h, w, stride):
    grid = torch.randn(h, w, 3, generator=torch.Generator().manual_seed(0))
    found = in_groups(1, h, w, (stride,))
    want = resampled_naive(grid, stride)
    made = torch.zeros(len(found.place), 3)
    rows = grid.flatten(0, 1)[torch.from_numpy(found.source)] * torch.from_numpy(found.weight)[:, None].float()
    made.index_add_(0, torch.from_numpy(found.target), rows)
    assert torch.allclose(made, want, atol=1e-5)
    assert len(set(found.place.tolist())) == len(want)
    assert found.place.tolist() == sorted(found.place.tolist())


def test_each_frame_has_the_stride_of_its_place_in_the_group():
    found = in_groups(6, 4, 4, (1.0, 2.0))
    counts = torch.from_numpy(found.place).div(16, rounding_mode="floor").bincount()
    assert counts.tolist() == [16, 4] * 3


def test_halves_are_rounded_up():
    assert [smaller(27, stride) for stride in (2, 3, 4)] == [14, 9, 7]
    assert [smaller(1, 4.0), smaller(3, 9.0)] == [1, 1]


def test_sides_of_frames_are_known_where_they_are_full_grids():
    assert frame_sides(Layout.grid(3, 5, 4)) == (3, 5)
    assert frame_sides(Layout.grid(3, 5)) == (3, 5)
    assert frame_sides(Picture.tiled(4, 2, 1).lm) is None
