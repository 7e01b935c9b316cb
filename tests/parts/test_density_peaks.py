"""Density peaks against a loop over lists."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.density_peaks import density_peaks, density_peaks_naive


@pytest.mark.parametrize(("n", "clusters"), [(1, 1), (2, 1), (9, 9), (30, 1), (30, 4), (83, 9)])
def test_fast_equals_naive(n, clusters):
    for seed in range(4):
        x = torch.randn(3, n, 8, generator=torch.Generator().manual_seed(seed))
        centres, owner = density_peaks(x, clusters)
        for i, item in enumerate(x.double().tolist()):
            assert (centres[i].tolist(), owner[i].tolist()) == density_peaks_naive(item, clusters)


def test_planted_clusters_are_found_beside_large_norms():
    """A shared offset of 1000 takes nothing from distances of a tenth."""
    generator = torch.Generator().manual_seed(0)
    member = torch.arange(5).repeat_interleave(8)
    x = 1000 + torch.eye(5, 16)[member] + 0.05 * torch.randn(1, 40, 16, generator=generator)
    centres, owner = density_peaks(x, 5)
    assert set(member[centres[0]].tolist()) == set(range(5))
    assert torch.equal(member[centres[0]][owner[0]], member)


def test_a_batch_is_its_items_and_half_precision_its_single():
    x = torch.randn(4, 50, 12, generator=torch.Generator().manual_seed(3)).bfloat16()
    centres, owner = density_peaks(x, 6)
    for i in range(4):
        alone = density_peaks(x[i : i + 1].float(), 6)
        assert torch.equal(alone[0][0], centres[i])
        assert torch.equal(alone[1][0], owner[i])


def test_equal_tokens_and_broken_ones():
    centres, owner = density_peaks(torch.ones(1, 6, 4), 2)
    assert centres.tolist() == [[0, 1]]
    assert owner.tolist() == [[0, 1, 0, 0, 0, 0]]
    x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    x[0, [0, 3]] = torch.nan
    broken = x.isnan().any(-1)
    centres, owner = density_peaks(x, 3, broken)
    assert not {0, 3} & set(centres[0].tolist())
    assert owner[0, [0, 3]].tolist() == [-1, -1]
    centres, owner = density_peaks(x, 6, broken)
    assert sorted(centres[0].tolist()) == list(range(6))
