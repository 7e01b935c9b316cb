"""DPC-KNN against its naive form, and on clusters that are there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.dpc_knn import dpc_knn, dpc_knn_naive

from .test_select import HostReads


@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6), st.integers(0, 99))
def test_equals_its_naive_form(n, m, k, seed):
    m = min(m, n)
    x = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = dpc_knn(x, m, k)
    for lane in range(2):
        centre, cluster = dpc_knn_naive(x[lane].tolist(), m, k)
        assert found.centre[lane].tolist() == centre
        assert found.cluster[lane].tolist() == cluster


def test_clusters_that_are_there_are_found():
    generator = torch.Generator().manual_seed(0)
    member = torch.arange(60) % 4
    x = 10 * torch.randn(4, 8, generator=generator)[member] + 0.1 * torch.randn(60, 8, generator=generator)
    found = dpc_knn(x[None], 4, 5)
    assert member[found.centre[0]].sort().values.tolist() == [0, 1, 2, 3]
    assert torch.equal(member[found.centre[0]][found.cluster[0]], member)


def test_equal_tokens_fall_to_the_lowest_index():
    found = dpc_knn(torch.ones(1, 6, 3), 3, 2)
    assert found.centre.tolist() == [[0, 1, 2]]
    assert found.cluster.tolist() == [[0, 1, 2, 0, 0, 0]]


@pytest.mark.parametrize("shape", [(9, 5), (70, 33)])
def test_items_of_a_batch_give_what_they_give_alone_and_nothing_is_read(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    with HostReads():
        together = dpc_knn(x, 4, 5)
    for i in range(3):
        alone = dpc_knn(x[i : i + 1], 4, 5)
        assert torch.equal(alone.centre[0], together.centre[i])
        assert torch.equal(alone.cluster[0], together.cluster[i])
