"""The shared direction lies between two, turns with them, and ends in either."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.shared import slerp


def _pair(seed, d=6):
    x = torch.randn(2, 1, 1, 4, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, v = torch.nn.functional.normalize(x, dim=-1)
    return u, v, (u * v).sum(-1).clamp(-1, 1).arccos()


@given(st.floats(0, 1), st.integers(0, 99))
def test_is_as_far_along_the_arc_as_it_says(t, seed):
    u, v, angle = _pair(seed)
    e = slerp(u, v, angle, t)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones_like(angle))
    torch.testing.assert_close((e * u).sum(-1), (t * angle).cos())
    torch.testing.assert_close((e * v).sum(-1), ((1 - t) * angle).cos())


@given(st.integers(0, 99))
def test_turns_with_both(seed):
    u, v, angle = _pair(seed, d=2)
    c, s = math.cos(0.7), math.sin(0.7)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    torch.testing.assert_close(slerp(u @ turn.T, v @ turn.T, angle, 0.6), slerp(u, v, angle, 0.6) @ turn.T)


def test_equal_directions_stay():
    u, _, angle = _pair(0)
    torch.testing.assert_close(slerp(u, u, torch.zeros_like(angle), 0.6), u)
