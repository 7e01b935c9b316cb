"""Budgets split over tiles: equal, exact, and each tile its own ranking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.budget import split_evenly
from winnow.core.layout import Layout, grid_rows
from winnow.core.tiles import in_thumbnail, n_tiles, quotas, rank_in_tile, tile_of, top_k_per_tile
from winnow.core.view import View
from winnow.testing import Picture

TILED = Picture.tiled(4, 2, 1).lm  # 3 tiles of 16
UNEVEN = Layout.of("uneven", [grid_rows(2, 2), grid_rows(1, 3, grid=1, tile=1), grid_rows(5, 4, grid=1, tile=2)])


def _view(layout, b=1, left=None):
    n = layout.n_content if left is None else left.shape[1]
    ids = torch.arange(n).expand(b, n) if left is None else left
    return View(torch.zeros(b, n, 2), layout, ids, layout.n_content)


def _row(n, b=1, seed=0):
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed))


def test_tiles_of_layouts():
    assert [n_tiles(x) for x in (Layout.grid(3, 3), TILED, UNEVEN)] == [1, 3, 3]
    assert tile_of(_view(UNEVEN))[0].tolist() == [0] * 4 + [1] * 3 + [2] * 20


@pytest.mark.parametrize(
    ("total", "want"), [(3, [1, 1, 1]), (7, [3, 2, 2]), (12, [4, 3, 5]), (26, [4, 3, 19]), (99, [4, 3, 20])]
)
def test_small_tiles_give_what_they_have(total, want):
    assert quotas(_view(UNEVEN), total)[0].tolist() == want


@given(st.integers(1, 60), st.integers(0, 999))
def test_each_tile_keeps_its_own_best_to_the_exact_total(k, seed):
    for layout in (TILED, UNEVEN, Layout.grid(4, 5)):
        row = _row(layout.n_content, b=2, seed=seed)
        found = top_k_per_tile(row, k, _view(layout, b=2)).index
        tiles = layout.tiles.tolist()
        sizes = [tiles.count(t) for t in range(max(tiles) + 1)]
        share = split_evenly(min(k, layout.n_content), sizes)
        for i in range(2):
            want = []
            for t, quota in enumerate(share):
                mine = [j for j, tile in enumerate(tiles) if tile == t]
                want += sorted(mine, key=lambda j: (-row[i, j].item(), j))[:quota]
            assert found[i].tolist() == sorted(want)


def test_after_an_earlier_method_items_differ_in_what_is_left():
    left = torch.tensor([[0, 1, 2, 3, 16, 32], [0, 16, 17, 18, 19, 40]])
    view = _view(TILED, b=2, left=left)
    assert quotas(view, 4).tolist() == [[2, 1, 1], [1, 2, 1]]
    kept = top_k_per_tile(torch.arange(6.0).expand(2, 6), 4, view).index
    assert left.gather(1, kept).tolist() == [[2, 3, 16, 32], [0, 18, 19, 40]]


def test_rank_in_tile():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.2]])
    tile = torch.tensor([[0, 1, 0, 1, 0]])
    assert rank_in_tile(scores, tile).tolist() == [[2, 0, 0, 1, 1]]
    assert rank_in_tile(torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.int64)).tolist() == [[0, 1, 2, 3]]


def test_thumbnail():
    assert in_thumbnail(_view(TILED))[0].tolist() == [True] * 16 + [False] * 32
    assert in_thumbnail(_view(Layout.grid(3, 3))).all()
    frames = torch.arange(3).repeat_interleave(4).reshape(3, 2, 2).numpy()
    video = Layout.of("video", [grid_rows(2, 2, 3, tile=frames)])
    assert n_tiles(video) == 3
    assert in_thumbnail(_view(video)).all()
    assert in_thumbnail(_view(TILED, left=torch.tensor([[3, 15, 16, 40]]))).tolist() == [[True, True, False, False]]
