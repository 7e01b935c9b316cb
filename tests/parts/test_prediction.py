"""Predictive coding on a grid, against the same cell by cell."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.parts.prediction import causal, explained, explained_naive
from winnow.testing import Picture

CPU = torch.device("cpu")


def _within(limit):
    return lambda a, b: (a - b).abs().amax(-1) <= limit


def _cells(seed, layout, values):
    """Cells that often equal their neighbours, and one behind them that is none."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, values, (layout.n_content, 3), generator=generator)[:, :1].expand(-1, 3) / 10
    return torch.cat([cells, torch.full((1, 3), torch.nan)])


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_equals_the_scan_cell_by_cell(limit, anchored):
    for seed, (h, w) in enumerate(((1, 1), (1, 7), (7, 1), (6, 5), (8, 10)) * 8):
        layout = Layout.grid(h, w)
        x = _cells(seed, layout, 2 if limit == 0 else 5)
        want = explained_naive(x[:-1].unflatten(0, (h, w)), lambda a, b: (a - b).abs().amax() <= limit, anchored)
        found = explained(x, _within(limit), causal(layout, CPU), anchored)[:-1]
        assert found.unflatten(0, (h, w)).tolist() == want


def test_where_similar_is_equal_a_scan_changes_nothing():
    for seed in range(100):
        layout = Layout.grid(6, 7)
        x, grid = _cells(seed, layout, 2), causal(layout, CPU)
        assert torch.equal(explained(x, _within(0), grid, True), explained(x, _within(0), grid, False))


@pytest.mark.parametrize("anchored", [False, True])
def test_tiles_and_frames_are_scanned_by_themselves(anchored):
    for layout in (Picture.tiled(4, 2, 1).lm, Layout.grid(3, 4, 3)):
        x = torch.zeros(layout.n_content + 1, 2)
        x[-1] = torch.nan
        found = explained(x, _within(0), causal(layout, CPU), anchored)[:-1]
        place = layout.place[layout.content]
        firsts = [*zip(layout.tiles.tolist(), place[:, 1].tolist(), strict=True)]
        assert (~found).nonzero()[:, 0].tolist() == [firsts.index(first) for first in dict.fromkeys(firsts)]


@pytest.mark.parametrize("anchored", [False, True])
def test_what_is_not_there_explains_nothing_and_its_neighbour_is_asked(anchored):
    """On 2 × 3 equal cells without the second: the third has no A and no B, the fifth has an A."""
    x = torch.zeros(7, 2)
    x[[1, 6]] = torch.nan
    found = explained(x, _within(0), causal(Layout.grid(2, 3), CPU), anchored)
    assert found.tolist() == [False, False, False, True, True, True, False]
    x[3] = torch.nan  # the fifth has neither now; the sixth has the one above it
    found = explained(x, _within(0), causal(Layout.grid(2, 3), CPU), anchored)
    assert found.tolist() == [False, False, False, False, False, True, False]
