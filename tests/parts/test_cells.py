"""Merging cell by cell: the fast form against lists, its counts, and its weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.parts.cells import cells_of, merge_lowest, merge_lowest_naive
from winnow.testing import Picture


def view_of(layout: Layout, b: int = 1) -> View:
    return View.of(torch.zeros(b, layout.n_content, 4), layout=layout)


def made(reduction) -> tuple[list[int], list[dict[int, float]]]:
    rows = [{i: pytest.approx(w, abs=1e-5) for i, w in enumerate(row) if w} for row in reduction.to_matrix().tolist()]
    return reduction.representatives.tolist(), rows


@given(
    st.integers(2, 40),
    st.floats(1, 6),
    st.integers(0, 39),
    st.none() | st.integers(0, 9),
    st.integers(0, 99),
    st.booleans(),
)
def test_equals_the_same_in_lists(n, side, fewer, more, seed, ties):
    layout = Layout.grid(-(-n // 7), 7)
    n, fewer = layout.n_content, min(fewer, layout.n_content - 1)
    score = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) + 0.01
    score = (score * 4).ceil() / 4 if ties else score
    cells = cells_of(view_of(layout, 2), side)
    found = merge_lowest(score, cells, fewer, more)
    for lane in range(2):
        stay, rows = merge_lowest_naive(score[lane].tolist(), cells[lane].tolist(), fewer, more)
        assert made(found.lane(lane)) == (stay, rows)
    if more is None:
        assert (found.m, found.counts) == (n - fewer, None)


def test_cells_are_squares_of_any_side_and_never_of_two_grids():
    assert cells_of(view_of(Layout.grid(2, 6)), 2.5)[0].tolist() == [0, 0, 0, 1, 1, 2] * 2
    tiled = Picture.tiled(4, 2, 1).lm
    cells = cells_of(view_of(tiled), 100.0)[0]
    grids = torch.tensor(tiled.place[tiled.content, 0])
    assert len(set(zip(cells.tolist(), grids.tolist(), strict=True))) == len(set(grids.tolist()))


def test_weights_of_each_group_sum_to_one_and_nothing_is_lost():
    score = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    found = merge_lowest(score, cells_of(view_of(Layout.grid(8, 8), 3), 4.0), 40)
    assert found.is_stochastic
    assert bool(found.kept.all())
    assert bool((found.representatives.diff(dim=1) > 0).all())


def test_too_many_cells_lose_their_lowest():
    score = torch.arange(1.0, 13)[None]
    found = merge_lowest(score, cells_of(view_of(Layout.grid(3, 4)), 1.0), 9)
    assert made(found.lane(0)) == ([9, 10, 11], [{9: 1.0}, {10: 1.0}, {11: 1.0}])


def test_broken_tokens_are_merged_into_nothing_and_nothing_to_do_is_a_selection():
    score = torch.tensor([[-torch.inf, 2.0, 1.0, 4.0]])
    cells = torch.zeros(1, 4, dtype=torch.int64)
    found = merge_lowest(score, cells, 2)
    assert made(found.lane(0)) == ([1, 3], [{1: 2 / 3, 2: 1 / 3}, {3: 1.0}])
    tokens = torch.tensor([[[torch.nan], [1.0], [2.0], [3.0]]])
    assert bool(found.apply(tokens).isfinite().all())
    assert merge_lowest(score, cells, 0).is_selection
    flat = merge_lowest(torch.full((1, 4), -torch.inf), cells, 2)
    assert bool(flat.to_matrix().isfinite().all())


@pytest.mark.parametrize("more", [0, 3])
def test_ragged_counts_are_those_of_each_item(more):
    score = torch.stack([torch.arange(1.0, 17), torch.arange(16.0, 0, -1) % 7 + 1])
    found = merge_lowest(score, cells_of(view_of(Layout.grid(4, 4), 2), 2.0), 9, more)
    sizes = [len(merge_lowest_naive(s.tolist(), cells_of(view_of(Layout.grid(4, 4)), 2.0)[0].tolist(), 9, more)[0])
             for s in score]  # fmt: skip
    assert [found.lane(i).m for i in range(2)] == sizes
