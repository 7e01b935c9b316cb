"""Windows on grids and tiles, against loops over places."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.parts.windows import full_windows, means, windows
from winnow.testing import Picture

CPU = torch.device("cpu")


def test_rest_rows_and_columns_belong_to_the_last_window():
    found = windows(Layout.grid(5, 7), 2, CPU)
    assert found.of.reshape(5, 7).tolist() == [
        [0, 0, 1, 1, 2, 2, 2],
        [0, 0, 1, 1, 2, 2, 2],
        [3, 3, 4, 4, 5, 5, 5],
        [3, 3, 4, 4, 5, 5, 5],
        [3, 3, 4, 4, 5, 5, 5],
    ]
    assert found.tile.tolist() == [0] * 6


@pytest.mark.parametrize("layout", [Layout.grid(1, 2), Layout.grid(2, 1)])
def test_a_tile_smaller_than_a_window_is_one(layout):
    assert windows(layout, 6, CPU).of.tolist() == [0, 0]


def test_frames_and_tiles_have_windows_of_their_own():
    assert windows(Layout.grid(2, 2, 3), 2, CPU).of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    layout = Picture.tiled(4, 2, 1).lm
    found = windows(layout, 2, CPU)
    assert found.tile.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for window in range(12):
        own = (found.of == window).nonzero()[:, 0].tolist()
        places = layout.place[layout.content][own]
        assert len(own) == 4
        assert len({int(t) for t in layout.tiles[own]}) == 1
        assert (places.max(0) - places.min(0)).tolist() == [0, 0, 1, 1]


def test_full_windows_skip_what_is_left_over_and_give_rows():
    layout = Layout.grid(4, 5, cls=True)
    assert full_windows(layout, 3, CPU).tolist() == [[1 + r * 5 + c for r in range(3) for c in range(3)]]
    assert full_windows(layout, 2, CPU)[:, 0].tolist() == [1, 3, 11, 13]
    assert full_windows(layout, 6, CPU).shape == (0, 36)


def test_means_stand_in_the_middle():
    rows = full_windows(Layout.grid(6, 6), 3, CPU)
    chosen = torch.tensor([[True, False, False, True], [False, False, False, False]])
    x = torch.randn(2, 36, 4, generator=torch.Generator().manual_seed(0))
    found = means(rows, chosen, 36)
    assert found.counts == (20, 36)
    want = x[0].clone()
    want[7], want[28] = x[0, rows[0]].mean(0), x[0, rows[3]].mean(0)
    stay = [j for j in range(36) if j in (7, 28) or j not in {*rows[0].tolist(), *rows[3].tolist()}]
    assert found.lane(0).representatives.tolist() == stay
    torch.testing.assert_close(found.lane(0).apply(x[0]), want[stay])
    torch.testing.assert_close(found.lane(1).apply(x[1]), x[1])
    assert means(rows, chosen[1:], 36) is None
