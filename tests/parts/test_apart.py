"""The tiles of items apart, and choosing in each of them."""

from __future__ import annotations

import torch

from winnow.core.layout import Layout
from winnow.core.select import ranked
from winnow.core.tiles import top_k_per_tile
from winnow.core.view import View
from winnow.parts.apart import select_per_tile, tiles_apart
from winnow.testing import Picture

LAYOUT = Picture.tiled(3, 2, 1).lm
LEFT = torch.tensor([[0, 1, 2, 9], [10, 11, 18, 19]])


def test_tiles_of_whole_items_and_of_what_is_left_of_them():
    parts = list(tiles_apart(View.of(torch.zeros(2, 27, 1), layout=LAYOUT), 10))
    assert [(items, len(members), k) for items, members, k in parts] == [(slice(2), 9, k) for k in (4, 3, 3)]
    assert [set(LAYOUT.tiles[members]) for _, members, _ in parts] == [{0}, {1}, {2}]
    view = View(torch.zeros(2, 4, 1), LAYOUT, LEFT, 27)
    assert [(items.start, members.tolist(), k) for items, members, k in tiles_apart(view, 3)] == [
        (0, [0, 1, 2], 2),
        (0, [3], 1),
        (1, [0, 1], 2),
        (1, [2, 3], 1),
    ]


def test_one_tile_is_one_part():
    ((items, members, k),) = tiles_apart(View.of(torch.zeros(2, 6, 1), layout=Layout.grid(2, 3)), 9)
    assert (items, members.tolist(), k) == (slice(2), list(range(6)), 6)


def _best(k, scores):
    return ranked(scores)[:, :k]


def test_choosing_the_best_of_each_tile_is_top_k_per_tile():
    scores = torch.rand(2, 27, generator=torch.Generator().manual_seed(0))
    for layout, n in ((LAYOUT, 27), (Layout.grid(3, 9), 27)):
        view = View.of(torch.zeros(2, n, 1), layout=layout)
        for k in (1, 2, 10, 27, 30):
            found = select_per_tile(view, k, _best, scores)
            assert found.index.tolist() == top_k_per_tile(scores, k, view).index.tolist()
    view = View(torch.zeros(2, 4, 1), LAYOUT, LEFT, 27)
    for k in (1, 2, 3, 4):
        found = select_per_tile(view, k, _best, scores[:, :4])
        assert found.index.tolist() == top_k_per_tile(scores[:, :4], k, view).index.tolist()
