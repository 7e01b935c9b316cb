"""Outliers on a line: against the definition, and what is known of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.outliers import local_outlier_factor, local_outlier_factor_naive, outliers

from .test_select import HostReads


def everything(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores, dtype=torch.bool)


def spread(seed: int, n: int, b: int = 1) -> torch.Tensor:
    """A bulk and a long tail, as attention has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, n, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("n", [2, 5, 21, 60, 200])
def test_equals_the_definition(n, k):
    for seed in range(3):
        scores = spread(seed, n)
        want = local_outlier_factor_naive(scores[0].tolist(), k)
        assert local_outlier_factor(scores, k, everything(scores))[0].tolist() == pytest.approx(want, rel=1e-9)


@given(st.integers(0, 99), st.integers(1, 12))
def test_scores_that_do_not_count_are_not_there(seed, k):
    scores = spread(seed, 30, 2)
    among = torch.rand(2, 30, generator=torch.Generator().manual_seed(seed)) < 0.6
    found = local_outlier_factor(scores, k, among)
    for own, mask, factor in zip(scores, among, found, strict=True):
        want = local_outlier_factor(own[mask][None], k, torch.ones(1, int(mask.sum()), dtype=torch.bool))[0]
        assert torch.equal(factor[mask], want)
        assert not factor[~mask].any()


def test_one_far_away_and_none_among_equals():
    scores = torch.cat([torch.linspace(0, 1, 40), torch.tensor([5.0])])[None]
    assert outliers(scores, 5).tolist() == [1]
    assert outliers(scores, 5, "iqr").tolist() == [1]
    flat = torch.ones(2, 50)
    assert outliers(flat, 20).tolist() == outliers(flat, 20, "iqr").tolist() == [0, 0]


def test_scale_does_not_matter_and_none_or_one_score_has_no_outlier():
    scores = spread(0, 100)
    assert outliers(scores, 20).tolist() == outliers(scores * 32, 20).tolist()
    assert outliers(scores[:, :1], 20).tolist() == [0]
    assert outliers(scores, 20, among=torch.zeros(1, 100, dtype=torch.bool)).tolist() == [0]
    assert outliers(scores, 20, "iqr", torch.zeros(1, 100, dtype=torch.bool)).tolist() == [0]


def test_many_duplicates_make_what_lies_beside_them_an_outlier():
    """As scikit-learn has it: their own density is next to infinite."""
    scores = torch.cat([torch.zeros(30), torch.linspace(0.1, 1, 40)])[None]
    want = sum(f > 1.5 for f in local_outlier_factor_naive(scores[0].double().tolist(), 20))
    assert outliers(scores, 20).tolist() == [want]
    assert want > 0


def test_nothing_waits_for_the_device():
    with HostReads():
        outliers(spread(0, 64, 3), 20)
