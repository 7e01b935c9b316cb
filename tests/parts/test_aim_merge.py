"""AIM's merging against a loop over lists."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.parts.aim_merge import in_place, merge, merge_groups, merge_naive, schedule
from winnow.testing import Picture


def _equals_naive(x, rounds):
    cluster, weight, representative = merge(x, rounds)
    for i, item in enumerate(x.double().tolist()):
        naive = merge_naive(item, rounds)
        assert len(naive) == representative.shape[1]
        for number, sources in enumerate(naive):
            own = (cluster[i] == number).nonzero()[:, 0].tolist()
            assert own == sorted(sources)
            assert weight[i, own].tolist() == pytest.approx([sources[j] for j in own])
            assert int(representative[i, number]) == next(iter(sources))


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 49, 64])
def test_fast_equals_naive(n, rounds):
    _equals_naive(torch.randn(3, n, 12, generator=torch.Generator().manual_seed(n)), rounds)


def test_numbers_that_are_left():
    left = lambda n, rounds: n - sum(gone for _, gone in schedule(n, rounds))  # noqa: E731
    assert [left(196, r) for r in range(4)] == [196, 98, 49, 25]
    assert [left(576, r) for r in range(4)] == [576, 288, 144, 72]
    assert [left(1, 2), left(2, 2), left(3, 2), left(7, 2)] == [1, 1, 2, 3]


def test_groups_are_merged_by_themselves():
    x = torch.randn(22, 6, generator=torch.Generator().manual_seed(0))
    groups = [torch.arange(0, 16, 2), torch.arange(1, 16, 2), torch.arange(16, 22)]
    cluster, weight, representative = merge_groups(x, groups, 2)
    start = 0
    for group in groups:
        alone = merge(x[group][None], 2)
        assert torch.equal(cluster[group], alone.cluster[0] + start)
        assert torch.equal(weight[group], alone.weight[0])
        stop = start + alone.representative.shape[1]
        assert representative[start:stop].tolist() == group[alone.representative[0]].tolist()
        start = stop


def test_when_outputs_stand_in_the_order_of_the_tokens():
    assert in_place(Layout.grid(4, 4), 3)
    assert in_place(Layout.grid(1, 6), 1)
    assert not in_place(Layout.grid(1, 6), 2)
    assert not in_place(Picture.tiled(4, 2, 2).lm, 1)  # tiles of a mosaic stand row by row
    assert in_place(Picture.tiled(4, 2, 1).lm, 2)
    for n in (6, 8, 10, 12):
        representative = merge(torch.randn(1, n, 4, generator=torch.Generator().manual_seed(n)), 2).representative[0]
        assert bool((representative.diff() > 0).all()) or not in_place(Layout.grid(1, n), 2)


def test_equal_tokens_go_to_the_first():
    cluster, weight, representative = merge(torch.ones(1, 8, 4), 1)
    assert cluster.tolist() == [[0, 0, 0, 1, 0, 2, 0, 3]]
    assert representative.tolist() == [[1, 3, 5, 7]]
    assert weight[0, 0] == 1 / 5
