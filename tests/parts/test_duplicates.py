"""Dropping duplicates in rounds, against the same written with lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.cosine import product, unit
from winnow.parts.duplicates import without_duplicates, without_duplicates_naive


def _some(seed, n, b=1):
    generator = torch.Generator().manual_seed(seed)
    x, _ = unit(torch.randn(b, n, 6, generator=generator))
    return x, torch.stack([torch.randperm(n, generator=generator) for _ in range(b)])


@given(st.integers(2, 90), st.integers(0, 99), st.data())
def test_equals_the_naive_form(n, seed, data):
    x, order = _some(seed, n, 2)
    length = data.draw(st.integers(1, n))
    count = data.draw(st.integers(1, length))
    order = order[:, :length]
    found = without_duplicates(x, order, count, torch.zeros(2, n, dtype=torch.bool))
    alike = product(x, x).tolist()
    assert found.tolist() == [without_duplicates_naive(alike[i], order[i].tolist(), count) for i in (0, 1)]


@pytest.mark.parametrize("n", [64, 65])
def test_equal_tokens_go_in_the_order_of_the_list(n):
    x, order = [torch.ones(n, 4) / 2], torch.arange(n)[None]
    found = without_duplicates(x, order, n - 5, torch.zeros(1, n, dtype=torch.bool))
    assert found[0].tolist() == [j for j in range(0, n, 2) if j > 8] + list(range(1, n, 2))


def test_a_batch_is_its_items():
    x, order = _some(3, 70, 4)
    broken = torch.rand(4, 70, generator=torch.Generator().manual_seed(0)) < 0.1
    together = without_duplicates(x, order, 20, broken)
    apart = [without_duplicates(x[i : i + 1], order[i : i + 1], 20, broken[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(apart))


def test_broken_tokens_go_first_and_nothing_is_like_them():
    x, order = _some(5, 20)
    broken = torch.zeros(1, 20, dtype=torch.bool)
    broken[0, order[0, [0, 4, 6]]] = True
    left = without_duplicates(x, order, 17, broken)[0]
    assert not broken[0, left].any()
