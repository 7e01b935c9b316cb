"""Greedy choice against its naive form, and the rows that it reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.parts import cosine
from winnow.parts.cosine import TableRows, cosine_rows, neighbours, product, product_rows, unit
from winnow.parts.greedy import CRITERIA, greedy, greedy_naive

from .test_select import HostReads


@st.composite
def tables(draw):
    """Symmetric tables of small integers: sums and maxima are exact, ties are many."""
    n = draw(st.integers(1, 9))
    flat = draw(st.lists(st.integers(-3, 3), min_size=n * n, max_size=n * n))
    table = torch.tensor(flat, dtype=torch.float32).reshape(n, n)
    return torch.triu(table) + torch.triu(table, 1).T


@given(st.lists(tables(), min_size=1, max_size=1), st.sampled_from(CRITERIA), st.data())
def test_equals_its_naive_form(found, criterion, data):
    (table,) = found
    n = len(table)
    first, k = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n))
    picks = greedy(TableRows(table[None]), torch.tensor([[first]]), k, criterion=criterion)
    assert picks[0].tolist() == greedy_naive(table.tolist(), first, k, criterion)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_items_of_a_batch_do_not_mix(criterion):
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(4, 11, 11, generator=generator)
    tables = tables + tables.mT
    first = torch.tensor([[0], [3], [10], [5]])
    picks = greedy(TableRows(tables), first, 7, criterion=criterion)
    for i in range(4):
        assert picks[i].tolist() == greedy_naive(tables[i].tolist(), first[i].item(), 7, criterion)


def test_broken_tokens_come_last_each_once():
    table = torch.zeros(1, 5, 5)
    broken = torch.tensor([[True, False, False, True, False]])
    picks = greedy(TableRows(table), torch.tensor([[1]]), 5, broken=broken)
    assert picks[0].tolist() == [1, 2, 4, 0, 3]


@pytest.mark.parametrize("shape", [(5, 3), (37, 11), (64, 64), (10, 40)])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_rows_from_a_table_and_computed_rows_choose_the_same(shape, criterion):
    x, _ = unit(torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)))
    first = torch.tensor([[0], [1], [4]])
    by_table = greedy(TableRows(product(x, x)), first, shape[0], criterion=criterion)
    assert torch.equal(greedy(product_rows(x), first, shape[0], criterion=criterion), by_table)
    assert torch.equal(greedy(cosine_rows(x), first, shape[0], criterion=criterion), by_table)


@pytest.mark.parametrize("shape", [(7, 3), (33, 17), (150, 31), (576, 100)])
@pytest.mark.parametrize("make", [product_rows, lambda x: neighbours(x)[0]], ids=["computed", "table"])
def test_rows_of_a_batch_have_the_bits_of_its_items_alone(shape, make):
    tokens = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    at = torch.tensor([[0], [2], [6]])
    together = make(unit(tokens)[0])(at)
    for i in range(3):
        assert torch.equal(make(unit(tokens[i : i + 1])[0])(at[i : i + 1])[0], together[i])


def test_neighbours_in_blocks_are_those_of_the_table(monkeypatch):
    x, _ = unit(torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(3)))
    rows, closest = neighbours(x)
    monkeypatch.setattr(cosine, "TABLE_LIMIT", 49)
    blocked_rows, blocked = neighbours(x, block=16)
    torch.testing.assert_close(blocked, closest)
    at = torch.tensor([[4], [9]])
    other = torch.ones(2, 50, dtype=torch.bool).scatter(1, at, False)
    torch.testing.assert_close(rows(at)[other], blocked_rows(at)[other])
    naive = product(x, x).masked_fill(torch.eye(50, dtype=torch.bool), -1).amax(2)
    assert torch.equal(closest, naive)


def test_one_token_has_no_neighbour():
    rows, closest = neighbours(unit(torch.ones(1, 1, 4))[0])
    assert closest.tolist() == [[-1.0]]
    assert greedy(rows, torch.tensor([[0]]), 1).tolist() == [[0]]


def test_unit_zeroes_what_is_broken_and_leaves_its_input():
    tokens = torch.tensor([[[3.0, 4.0], [torch.nan, 1.0], [torch.inf, 0.0], [0.0, 0.0]]])
    (x,), broken = unit(tokens)
    assert broken.tolist() == [[False, True, True, False]]
    torch.testing.assert_close(x, torch.tensor([[0.6, 0.8], [0, 0], [0, 0], [0, 0]]))
    assert tokens.isnan().any()
    (half,), _ = unit(tokens.bfloat16())
    assert half.dtype == torch.float32
    assert half.isfinite().all()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_host_read_inside_the_loop(criterion):
    x, _ = unit(torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)))
    for rows in (product_rows(x), neighbours(x)[0]):
        with HostReads():
            greedy(rows, torch.zeros(2, 1, dtype=torch.int64), 10, criterion=criterion)


def test_unknown_criterion():
    with pytest.raises(WinnowError, match="allowed: max, sum"):
        greedy(TableRows(torch.zeros(1, 2, 2)), torch.zeros(1, 1, dtype=torch.int64), 1, criterion="min")
