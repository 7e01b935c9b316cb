"""Means over windows of frames, rows and columns: against torch's pooling, and place by place."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, avg_pool1d

from winnow.parts.windows_of_frames import adaptive, in_time, squares, strided

CPU = torch.device("cpu")


def applied(found, x):
    out = torch.zeros(len(found.anchor), x.shape[-1], dtype=x.dtype)
    return out.index_add(0, found.target, x[found.source] * found.weight[:, None].to(x))


def grid(t, h, w, d=5):
    return torch.randn(t, h, w, d, generator=torch.Generator().manual_seed(t * 100 + h * 10 + w), dtype=torch.float64)


@pytest.mark.parametrize(("t", "h", "w", "side"), [(3, 27, 27, 3), (2, 5, 4, 3), (4, 3, 3, 1), (1, 2, 7, 3)])
def test_squares_are_torchs_adaptive_means(t, h, w, side):
    x = grid(t, h, w)
    made = applied(squares(t, h, w, side, CPU), x.flatten(0, 2))
    want = adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (min(h, side), min(w, side))).permute(0, 2, 3, 1)
    assert (made - want.flatten(0, 2)).abs().max() <= 1e-6


@pytest.mark.parametrize("t", [8, 9, 11, 16])
@pytest.mark.parametrize("zeros", [False, True])
def test_windows_in_time_are_means_of_frames_that_were_filled_up(t, zeros):
    x = grid(t, 1, 6)
    made = applied(in_time(t, 6, 4, 1, zeros, CPU), x.flatten(0, 2))
    last = torch.zeros_like(x[-1:]) if zeros else x[-1:]
    full = torch.cat([x, last.expand(-t % 4, -1, -1, -1)]) if t % 4 else x
    want = avg_pool1d(full[:, 0].permute(1, 2, 0), 4).permute(2, 0, 1)
    assert (made - want.flatten(0, 1)).abs().max() <= 1e-6


def test_few_frames_are_left_as_they_are_and_some_more_become_the_least():
    assert [list(window) for window in strided(10, 4, 16)] == [[i] for i in range(10)]
    assert len(strided(40, 4, 16)) == 16
    assert strided(40, 4, 16) == adaptive(40, 16)
    assert len(strided(64, 4, 16)) == 16
    assert len(strided(65, 4, 16)) == 17


@pytest.mark.parametrize(("side", "parts"), [(27, 3), (5, 4), (7, 7), (4, 9), (10, 3)])
def test_every_place_is_in_a_window_and_anchors_ascend(side, parts):
    windows = adaptive(side, parts)
    assert {place for window in windows for place in window} == set(range(side))
    assert all(sum(window.values()) == pytest.approx(1) for window in windows)
    anchors = squares(1, side, side, parts, CPU).anchor.tolist()
    assert anchors == sorted(set(anchors))
