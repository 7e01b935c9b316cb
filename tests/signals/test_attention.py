"""Attention without its matrix equals attention with it."""

from __future__ import annotations

import pytest
import torch

from winnow.signals.attention import attention_rows, column_mean, column_mean_naive


def make(b, h, n, d, *, groups=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda heads: torch.randn(b, heads, n, d, generator=generator, dtype=dtype)  # noqa: E731
    return draw(h), draw(groups or h)


@pytest.mark.parametrize(
    ("b", "h", "n", "d"), [(1, 1, 1, 1), (2, 3, 7, 4), (1, 2, 65, 16), (3, 2, 64, 64), (1, 4, 63, 100)]
)
def test_column_means_equal_those_of_the_whole_matrix(b, h, n, d):
    q, k = make(b, h, n, d, dtype=torch.float32)
    assert torch.allclose(column_mean(q, k, d**-0.5), column_mean_naive(q, k, d**-0.5), atol=1e-6)


def test_column_means_sum_to_one_over_the_keys():
    q, k = make(2, 3, 17, 8)
    assert torch.allclose(column_mean(q, k, 0.3).sum(-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype):
    q, k = make(1, 2, 33, 8, dtype=torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    found = column_mean(q, k, 0.3)
    assert found.dtype == torch.float32
    assert torch.allclose(found, column_mean_naive(q.float(), k.float(), 0.3), atol=1e-6)


def test_inputs_are_left_as_they_were():
    q, k = make(1, 2, 9, 4, dtype=torch.float32)
    before = q.clone(), k.clone()
    column_mean(q, k, 0.5)
    attention_rows(q, k, 0.5)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_rows_of_grouped_queries_equal_those_with_repeated_keys(groups):
    q, k = make(2, 4, 6, 8, groups=groups)
    repeated = k.repeat_interleave(4 // groups, 1)
    expected = (q @ repeated.transpose(-1, -2) * 0.2).softmax(-1)
    assert torch.allclose(attention_rows(q, k, 0.2), expected)


def test_rows_give_nothing_to_what_they_cannot_see():
    q, k = make(1, 2, 6, 4)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    rows = attention_rows(q, k, 0.5, visible)
    assert torch.equal(rows.masked_fill(visible, 0), torch.zeros_like(rows))
    assert torch.allclose(rows.sum(-1), torch.ones(1, 2, 6, dtype=torch.float64))
