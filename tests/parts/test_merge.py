"""Sums of the nearest tokens, and maps of items from those of their tiles."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.cosine import unit
from winnow.parts.merge import mixture, sums_of_nearest, sums_of_nearest_naive


@pytest.mark.parametrize("count", [0, 1, 5, 19, 40])
def test_sums_equal_their_naive_form(count):
    generator = torch.Generator().manual_seed(count)
    (keys,), _ = unit(torch.randn(1, 20, 6, generator=generator))
    weight, kept = torch.rand(20, generator=generator) + 0.1, torch.randperm(20, generator=generator)[:7]
    found = sums_of_nearest(kept, keys, weight, count)
    want = sums_of_nearest_naive(kept.tolist(), (keys @ keys.T).tolist(), weight.tolist(), count)
    torch.testing.assert_close(found, torch.tensor(want))


def test_what_weighs_nothing_comes_last():
    (keys,), _ = unit(torch.ones(1, 6, 3))
    rows = sums_of_nearest(torch.tensor([2]), keys, torch.tensor([0.0, 0.1, 0.2, 0.0, 0.4, 0.5]), 3)
    assert rows.tolist() == [pytest.approx([0, 0.1, 1, 0, 0.4, 0.5])]


def test_tiles_stand_one_behind_the_other():
    first = (torch.tensor([1, 2]), torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
    second = (torch.tensor([3, 5]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1]))
    even = mixture([[first, second], [first, second]], 6)
    assert even.counts is None
    assert even.matrix[1].tolist() == [[0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 2]]
    assert even.representative.tolist() == [[2, 3, 5]] * 2
    ragged = mixture([[first], [second]], 6)
    assert ragged.counts == (1, 2)
    assert ragged.lane(0).representative.tolist() == [2]
    assert ragged.lane(1).matrix.tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 2]]
