"""Rows of grids: the fast form equals the naive one."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.parts.rows import row_sums, row_sums_naive, rows_of
from winnow.testing import Picture

LAYOUTS = (Layout.grid(1, 1), Layout.grid(5, 3), Layout.grid(2, 3, 4), Picture.tiled(3, 2, 2).lm)
CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.key))
@pytest.mark.parametrize("left", [1.0, 0.5])
def test_sums_equal_the_naive_ones(layout, left):
    generator = torch.Generator().manual_seed(layout.n)
    n = max(1, int(left * layout.n_content))
    ids = torch.stack([torch.randperm(layout.n_content, generator=generator)[:n].sort().values for _ in range(2)])
    scores = torch.rand(2, n, generator=generator)
    rows = rows_of(layout, CPU)
    found = row_sums(scores, ids, rows)
    first = [own[own < layout.n_content][0] for own in rows.members]
    lines = [(int(layout.tiles[i]), *map(int, layout.place[layout.content[i], :3])) for i in first]
    assert lines == sorted(set(lines))
    for lane in range(2):
        want = row_sums_naive(scores[lane].tolist(), ids[lane].tolist(), layout)
        assert found[lane].tolist() == pytest.approx([want.get(line, -torch.inf) for line in lines])


def test_rows_of_tiles():
    rows = rows_of(Picture.tiled(3, 2, 1).lm, CPU)
    assert rows.heights == (3, 3, 3)
    assert rows.widths == (3, 3, 3)
    assert rows.tile.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert rows_of(Layout.grid(4, 2, 3), CPU).heights == (12,)


def test_a_row_with_a_broken_token_comes_behind_the_others_and_before_those_without_tokens():
    layout = Layout.grid(4, 2)
    ids = torch.tensor([[0, 1, 2, 3, 4, 5]])
    scores = torch.tensor([[0.0, -torch.inf, torch.inf, -torch.inf, -1.0, -2.0]])
    sums = row_sums(scores, ids, rows_of(layout, CPU))[0].tolist()
    assert sums[2] == -3
    assert sums[0] == sums[1] == torch.finfo(torch.float32).min
    assert sums[3] == -torch.inf
