"""Greedy coverage: against its naive form, and what is known of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.coverage import _lazy, _whole, coverage, coverage_naive


@st.composite
def tables(draw):
    """Small integers: sums are exact, ties are many."""
    n, r = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    flat = draw(st.lists(st.integers(0, 3), min_size=n * r, max_size=n * r))
    return torch.tensor(flat, dtype=torch.float32).reshape(n, r)


def soft(n: int, seed: int, heat: float = 0.2) -> torch.Tensor:
    x = torch.nn.functional.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return (x @ x.T / heat).softmax(0) / n


@given(tables(), st.data())
def test_equals_its_naive_form(table, data):
    k = data.draw(st.integers(1, len(table)))
    assert coverage([table], k)[0].tolist() == coverage_naive(table, k)


@pytest.mark.parametrize("heat", [0.02, 0.2, 2.0])
def test_bounds_choose_what_all_gains_choose(heat):
    for seed in range(4):
        table, never = soft(90, seed, heat), torch.zeros(90, dtype=torch.bool)
        table[40:50] = table[10:20]  # ties
        assert torch.equal(_lazy(table, 90, never), _whole(table, 90, never))


def value(table: torch.Tensor, chosen) -> float:
    return float(table[list(chosen)].amax(0).sum())


def test_within_its_guarantee_of_the_best_set_there_is():
    for seed in range(5):
        table = soft(12, seed).double()
        best = max(value(table, chosen) for chosen in itertools.combinations(range(12), 3))
        assert value(table, coverage([table], 3)[0].tolist()) >= (1 - 1 / 2.718281828) * best


def test_gains_never_grow_and_value_never_falls():
    table = soft(30, 0).double()
    picks = coverage([table], 30)[0].tolist()
    values = [0.0] + [value(table, picks[: i + 1]) for i in range(30)]
    gains = [b - a for a, b in itertools.pairwise(values)]
    assert min(gains) >= 0
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gains))


def test_broken_columns_come_last_each_once():
    broken = torch.tensor([[True, False, False, True, False]])
    for choose in (_lazy, _whole):
        assert choose(torch.ones(5, 3), 5, broken[0]).tolist() == [1, 2, 4, 0, 3]
    assert coverage([torch.ones(5, 3)], 4, broken=broken).tolist() == [[1, 2, 4, 0]]


def test_items_of_a_batch_do_not_mix():
    own = [soft(25, seed) for seed in range(3)]
    assert coverage(own, 9).tolist() == [coverage([table], 9)[0].tolist() for table in own]
