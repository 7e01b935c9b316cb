"""Neighbours on the grid of a tile."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.parts.grid import neighbours
from winnow.testing import Picture

CPU = torch.device("cpu")


def test_golden_3_by_3():
    table = neighbours(Layout.grid(3, 3), CPU)
    assert table[4].tolist() == [3, 5, 1, 7]
    assert table[0].tolist() == [9, 1, 9, 3]
    assert table[5].tolist() == [4, 9, 2, 8]


def test_wrap_is_by_flat_index():
    table = neighbours(Layout.grid(3, 3), CPU, wrap=True)
    assert table[5].tolist() == [4, 6, 2, 8]  # 6 is the first of the next row
    assert table[0].tolist() == [0, 1, 0, 3]  # what lies before the first is the first
    assert table[7].tolist() == [6, 8, 4, 8]  # what lies behind the last is the last


@pytest.mark.parametrize("layout", [Layout.grid(4, 3, 2), Picture.tiled(3, 2, 2).lm], ids=["video", "tiled"])
def test_neighbours_are_one_step_away_in_the_same_tile_and_frame(layout):
    table, n = neighbours(layout, CPU), layout.n_content
    place, tile = layout.place[layout.content], layout.tiles
    for j in range(n):
        near = {
            i
            for i in range(n)
            if tile[i] == tile[j] and abs(place[i] - place[j]).sum() == 1 and place[i][1] == place[j][1]
        }
        assert {i for i in table[j].tolist() if i < n} == near


def test_newlines_are_no_neighbours():
    assert torch.equal(neighbours(Layout.grid(3, 4, newline=True), CPU), neighbours(Layout.grid(3, 4), CPU))
