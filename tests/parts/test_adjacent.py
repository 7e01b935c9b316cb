"""Joining neighbours: pairs as a plain loop finds them, and runs as means in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.adjacent import alike, apart, disjoint_pairs, disjoint_pairs_naive, means_of, merged_runs, runs_of


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 12))
def test_pairs_are_those_of_the_plain_loop_ties_included(values, count):
    score = torch.tensor([values], dtype=torch.float32)
    assert disjoint_pairs(score, count)[0].nonzero()[:, 0].tolist() == disjoint_pairs_naive(values, count)


@pytest.mark.parametrize("n", range(1, 40))
def test_a_third_of_the_scores_can_always_be_taken(n):
    for seed in range(5):
        assert int(disjoint_pairs(rand(1, n, seed=seed), -(-n // 3)).sum()) == -(-n // 3)


def test_what_is_ruled_out_is_never_taken():
    score = rand(3, 20).masked_fill(rand(3, 20, seed=1) > 0, -torch.inf)
    taken = disjoint_pairs(score, 20)
    assert taken.any()
    assert not (taken & (score == -torch.inf)).any()
    assert not disjoint_pairs(torch.full((1, 5), -torch.inf), 5).any()
    assert disjoint_pairs(torch.empty(2, 0), 0).shape == (2, 0)


def test_a_batch_is_its_items():
    x = rand(4, 50, 8)
    pairs = disjoint_pairs(alike(x), 9)
    run = runs_of(pairs)
    means = means_of(x, run, torch.ones(4, 50, dtype=torch.bool))
    for i in range(4):
        own = x[i : i + 1]
        assert torch.equal(disjoint_pairs(alike(own), 9)[0], pairs[i])
        assert torch.equal(means_of(own, run[i : i + 1], torch.ones(1, 50, dtype=torch.bool))[0], means[i])


def test_runs_are_means_at_their_middle_and_broken_tokens_do_not_count():
    x = rand(1, 6, 3)
    x[0, 4] = torch.nan
    found, broken = apart(x)
    assert broken[0].tolist() == [False] * 4 + [True, False]
    run = torch.tensor([[0, 0, 0, 1, 1, 2]])
    reduction = merged_runs(run, ~broken, [3])
    assert reduction.representatives[0].tolist() == [1, 3, 5]
    want = torch.stack([x[0, :3].mean(0), x[0, 3], x[0, 5]])
    assert torch.allclose(reduction.apply(x)[0], want)
    assert torch.allclose(means_of(found, run, ~broken)[0, :3], want)
    assert reduction.is_stochastic


def test_a_run_of_broken_tokens_stays_broken_and_alone():
    x = rand(1, 4, 3)
    x[0, :2] = torch.inf
    _, broken = apart(x)
    out = merged_runs(torch.tensor([[0, 0, 1, 1]]), ~broken, [2]).apply(x)
    assert not out[0, 0].isfinite().any()
    assert out[0, 1].isfinite().all()


def test_items_may_leave_unequal_numbers():
    x, run = rand(2, 4, 3), torch.tensor([[0, 0, 0, 0], [0, 1, 1, 2]])
    reduction = merged_runs(run, torch.ones(2, 4, dtype=torch.bool), [1, 3])
    assert reduction.counts == (1, 3)
    assert torch.allclose(reduction.lane(0).apply(x[0]), x[0].mean(0, keepdim=True))
    assert torch.allclose(reduction.lane(1).apply(x[1]), torch.stack([x[1, 0], x[1, 1:3].mean(0), x[1, 3]]))
    assert reduction.lane(1).representatives.tolist() == [0, 1, 3]


def test_as_many_runs_as_tokens_are_a_selection_of_all():
    reduction = merged_runs(torch.arange(5).repeat(2, 1), torch.ones(2, 5, dtype=torch.bool), [5, 5])
    assert reduction.is_selection
    assert reduction.index.tolist() == [list(range(5))] * 2
