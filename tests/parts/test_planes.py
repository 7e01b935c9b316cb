"""Planes of a layout: each token once, in the place where it lies."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.parts.planes import planes
from winnow.testing import Picture

LAYOUTS = [Layout.grid(3, 5), Layout.grid(2, 3, 4), Picture.tiled(4, 2, 1).lm]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["picture", "video", "tiles"])
def test_each_token_is_once_where_it_lies(layout):
    place = layout.place[layout.content]
    found = planes(layout, torch.device("cpu"))
    tokens = torch.cat([plane.flatten() for plane in found])
    assert sorted(tokens.tolist()) == list(range(layout.n_content))
    for plane in found:
        for (frame, row, col), token in zip(
            torch.cartesian_prod(*map(torch.arange, plane.shape)).tolist(), plane.flatten().tolist(), strict=True
        ):
            assert place[token, 1:].tolist() == [frame, row, col]


def test_shapes():
    assert [tuple(plane.shape) for layout in LAYOUTS for plane in planes(layout, torch.device("cpu"))] == [
        (1, 3, 5),
        (4, 2, 3),
        (1, 4, 4),
        (1, 8, 4),
    ]
