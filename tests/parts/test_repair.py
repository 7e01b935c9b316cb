"""Outliers and low-rank parts: equal to their definition; the low-rank part is the best of its rank, or near it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.forms import Plain
from winnow.parts.repair import Repaired, Spiked, spiked_naive


@given(st.integers(2, 30), st.integers(1, 6), st.sampled_from([2, 4]), st.integers(0, 12), st.integers(0, 99))
def test_outliers_equal_the_definition(n, each, bits, group, seed):
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed))
    each = min(each, n // 2)
    found = Spiked.of(x, each, bits, group, torch.float32).read()
    wanted = torch.tensor([[spiked_naive(line, each, bits, group) for line in own] for own in x.double().tolist()])
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("each", [5, 7, 9])
def test_more_outliers_than_there_are_entries_are_all_of_them_once(each):
    x = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(0))
    form = Spiked.of(x, each, 2, 0, torch.float32)
    assert form.value.shape[2] == 9
    assert torch.equal(form.read(), x)


def test_indices_take_two_bytes_where_they_fit():
    short, long = torch.randn(1, 1, 2**15), torch.randn(1, 1, 2**15 + 1)
    assert Spiked.of(short, 1, 2, 64, torch.float32).at.dtype == torch.int16
    assert Spiked.of(long, 1, 2, 64, torch.float32).at.dtype == torch.int32
    assert Spiked.of(short, 3, 2, 64, torch.float32).at.min() >= 0


def _start(heads, d, rank):
    return torch.rand(heads, d, rank, generator=torch.Generator().manual_seed(0))


def test_the_full_rank_is_exact():
    x = torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    form = Repaired.of(x, Plain(torch.zeros_like(x)), _start(3, 8, 8), 3, torch.float32)
    torch.testing.assert_close(form.read(), x, atol=1e-5, rtol=1e-5)


def test_many_loops_find_the_best_matrix_of_that_rank():
    x = 1e4 * torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0)) * 0.7 ** torch.arange(8)
    form = Repaired.of(x, Plain(torch.zeros_like(x)), _start(3, 8, 2), 20, torch.float32)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best = u[..., :2] * s[..., None, :2] @ v[..., :2, :]
    torch.testing.assert_close(form.read(), best, atol=3, rtol=1e-3)


def test_a_sample_has_the_same_part_in_any_batch():
    x = torch.randn(3, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    form = Repaired.of(x, Plain(torch.zeros_like(x)), _start(2, 8, 2), 3, torch.float32)
    one = Repaired.of(x[1:2], Plain(torch.zeros_like(x[1:2])), _start(2, 8, 2), 3, torch.float32)
    assert torch.equal(form.read()[1:2], one.read())
