from __future__ import annotations

import pytest
import torch

from winnow.contract import Layout, View
from winnow.parts.spacetime import blocks_of, starts
from winnow.testing import Picture


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", range(1, 30))
def test_blocks_cover_a_side_evenly_and_are_of_one_size(length, side):
    found = starts(length, side)
    size = min(side, length)
    assert len(found) == -(-length // side)
    assert len(set(found)) == len(found)
    assert {i for at in found for i in range(at, at + size)} == set(range(length))
    assert found[-1] + size == length
    if length % side == 0:
        assert found == list(range(0, length, side))


def view_of(layout: Layout, left: int | None = None) -> View:
    n = layout.n_content if left is None else left
    return View.of(torch.randn(2, n, 4), layout=layout)


def test_blocks_of_a_clip_are_those_of_loops():
    t, h, w = 5, 4, 3
    found = blocks_of(view_of(Layout.grid(h, w, t)), 2, 2)
    want = []
    for f in (0, 2, 3):  # of 5 frames in blocks of 2: 0, 1.5, 3, halves to the even
        for r in (0, 2):
            for c in (0, 1):
                want.append([((f + i) * h + r + j) * w + c + k for i in range(2) for j in range(2) for k in range(2)])
    assert found.rows.tolist() == want
    assert found.middle.tolist() == [own[4] for own in want]
    assert sorted([*found.middle.tolist(), *found.others.tolist()]) == list(range(t * h * w))


def test_a_picture_has_blocks_of_one_frame_and_each_grid_its_own():
    layout = Picture.tiled(4, 2, 1).lm
    found = blocks_of(view_of(layout), 4, 3)
    assert found.rows.shape == (4 + 3 * 2, 9)
    assert len(set(found.middle.tolist())) == len(found.middle)
    grids = torch.tensor(layout.place[layout.content][:, 0])
    assert all(len(set(grids[row].tolist())) == 1 for row in found.rows)


def test_what_an_earlier_method_left_is_cut_into_runs():
    found = blocks_of(view_of(Layout.grid(3, 3, 8), left=20), 4, 2)
    assert found.rows.tolist() == [list(range(16)), list(range(4, 20))]
    assert len(set(found.middle.tolist())) == 2
    of_picture = blocks_of(view_of(Layout.grid(6, 5), left=7), 4, 2)
    assert of_picture.rows.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_empty_places_are_told():
    """A grid whose last row is short."""
    import numpy as np

    from winnow.core.layout import grid_rows

    whole = grid_rows(3, 3)
    layout = Layout.of("short", [{name: np.asarray(x)[:8] for name, x in whole.items()}])
    found = blocks_of(view_of(layout), 1, 3)
    assert found.rows.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert found.middle.tolist() == [4]
    apart = blocks_of(view_of(layout), 1, 2)
    assert int((apart.rows == 8).sum()) == 1
    assert (apart.middle < 8).all()
