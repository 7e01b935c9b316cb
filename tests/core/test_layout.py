"""Layouts: kinds, tiles, places, boxes, and which tokens cover a box."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.core.layout import CLS, CONTENT, SEPARATOR, Layout, cls_token, grid_rows, separators


def test_grid():
    layout = Layout.grid(2, 3, cls=True, newline=True)
    assert layout.kind.tolist() == [CLS] + [CONTENT, CONTENT, CONTENT, SEPARATOR] * 2
    assert (layout.n, layout.n_content, layout.n_separators) == (9, 6, 2)
    assert layout.content.tolist() == [1, 2, 3, 5, 6, 7]
    assert layout.cell[layout.content].tolist() == list(range(6))
    assert layout.place[layout.content].tolist() == [[0, 0, r, c] for r in range(2) for c in range(3)]
    np.testing.assert_allclose(layout.boxes[5], [0, 0.5, 1 / 3, 1])
    special = layout.kind != CONTENT
    assert (layout.tile[special] == -1).all()
    assert (layout.cell[special] == -1).all()
    assert (layout.place[special] == -1).all()
    assert np.isnan(layout.boxes[special]).all()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.booleans(), st.booleans())
def test_boxes_of_a_frame_tile_the_picture(h, w, t, cls, newline):
    layout = Layout.grid(h, w, t, cls=cls, newline=newline)
    assert (layout.n_content, layout.n_separators) == (t * h * w, t * h * newline)
    boxes = layout.boxes[layout.content]
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
    assert area == pytest.approx(t)
    assert layout.place[layout.content, 1].tolist() == np.repeat(np.arange(t), h * w).tolist()


def test_equal_keys_are_equal_layouts():
    assert Layout.grid(2, 3) == Layout.grid(2, 3)
    assert hash(Layout.grid(2, 3)) == hash(Layout.grid(2, 3))
    different = {Layout.grid(2, 3), Layout.grid(3, 2), Layout.grid(2, 3, cls=True), Layout.grid(2, 3, newline=True)}
    assert len(different) == 4


def test_arrays_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        Layout.grid(2, 2).kind[0] = 1


def test_parts_are_joined_in_order_and_tiles_numbered_without_gaps():
    parts = [cls_token(), grid_rows(1, 2), separators(2), grid_rows(1, 3, grid=1, tile=np.array([[[4, 4, 7]]]))]
    layout = Layout.of("joined", parts)
    assert layout.kind.tolist() == [CLS, CONTENT, CONTENT, SEPARATOR, SEPARATOR, CONTENT, CONTENT, CONTENT]
    assert layout.tile[layout.content].tolist() == [0, 0, 4, 4, 7]
    assert layout.tiles.tolist() == [0, 0, 1, 1, 2]


def _covered(layout, *boxes, **more):
    return np.flatnonzero(layout.covering(boxes, **more)).tolist()


def test_covering_golden():
    layout = Layout.grid(4, 4)
    assert _covered(layout, (0.0, 0.0, 0.25, 0.25)) == [0]
    assert _covered(layout, (0.25, 0.25, 0.75, 0.5)) == [5, 6]
    assert _covered(layout, (0.0, 0.0, 1.0, 1.0)) == list(range(16))
    assert _covered(layout, (0.0, 0.0, 0.3, 0.25)) == [0, 1]  # 20 % of the second
    assert _covered(layout, (0.0, 0.0, 0.28, 0.25)) == [0]  # 12 % of the second
    assert _covered(layout, (0.0, 0.0, 0.28, 0.25), share=0.1) == [0, 1]
    assert _covered(layout, (0.0, 0.0, 0.1, 0.25), (0.9, 0.75, 1.0, 1.0)) == [0, 15]
    assert _covered(layout) == []


def test_a_small_box_counts_on_the_token_that_it_covers_most():
    layout = Layout.grid(4, 4)
    assert _covered(layout, (0.30, 0.30, 0.32, 0.32)) == [5]
    assert _covered(layout, (0.24, 0.30, 0.27, 0.32)) == [5]  # two thirds of it lie on token 5
    assert _covered(layout, (0.30, 0.30, 0.32, 0.32), (0.5, 0.5, 1.0, 1.0)) == [5, 10, 11, 14, 15]


def test_boxes_outside_the_picture_cover_nothing():
    assert _covered(Layout.grid(3, 3), (1.2, 0.0, 1.5, 1.0)) == []


def test_covering_knows_separators_from_content():
    assert _covered(Layout.grid(2, 2, cls=True, newline=True), (0.5, 0.5, 1.0, 1.0)) == [3]


def test_covering_looks_at_thumbnail_and_crops_alike():
    crop = grid_rows(2, 2, grid=1, tile=1, box=(0.5, 0.0, 1.0, 1.0))
    layout = Layout.of("two", [grid_rows(2, 2), crop])
    assert _covered(layout, (0.5, 0.0, 0.75, 0.5)) == [1, 4]


@pytest.mark.parametrize("box", [(0.5, 0, 0.5, 1), (0.6, 0, 0.5, 1), (0, 1, 1, 0), (float("nan"), 0, 1, 1)])
def test_empty_boxes_are_refused(box):
    with pytest.raises(WinnowError, match="is empty; expected x0 < x1"):
        Layout.grid(2, 2).covering([box])


unit = st.floats(0, 1)


@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.tuples(unit, unit, unit, unit), max_size=3))
def test_covering_against_every_token_by_itself(h, w, corners):
    layout = Layout.grid(h, w)
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners if abs(a - c) > 1e-3 < abs(b - d)]
    want = set()
    for x0, y0, x1, y1 in boxes:
        share = []
        for a, b, c, d in layout.boxes.tolist():
            wide, high = max(0.0, min(c, x1) - max(a, x0)), max(0.0, min(d, y1) - max(b, y0))
            share.append(wide * high / ((c - a) * (d - b)))
        if any(abs(s - 0.15) < 1e-9 for s in share):
            return  # on the edge rounding decides
        hit = {j for j, s in enumerate(share) if s > 0.15}
        if not hit:
            best = max(share)
            hit = {j for j, s in enumerate(share) if s >= best - 1e-12}
            if len(hit) > 1:
                return
        want |= hit
    assert set(_covered(layout, *boxes)) == want
