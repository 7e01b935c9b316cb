"""The greedy choice of a determinantal point process: against determinants, and where these are 0."""

from __future__ import annotations

import itertools

import pytest
import torch

from winnow.parts.cosine import TableRows, product, product_rows, unit
from winnow.parts.dpp import greedy_map, greedy_map_naive

from .test_select import HostReads

# The test kernel of OpenVINO: its order and its gains are known.
KERNEL = torch.tensor(
    [[0.8, 0.3, 0.1, 0.2], [0.3, 0.9, 0.4, 0.1], [0.1, 0.4, 0.7, 0.5], [0.2, 0.1, 0.5, 0.6]], dtype=torch.float64
)


def kernels(b: int, n: int, d: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    x = torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x @ x.mT / d


def choose(tables: torch.Tensor, k: int, **more) -> list[list[int]]:
    return greedy_map(TableRows(tables), tables.diagonal(dim1=1, dim2=2), k, **more).tolist()


def test_a_kernel_whose_order_and_gains_are_known():
    picks = choose(KERNEL[None], 4)[0]
    assert picks == [1, 0, 3, 2]
    dets = [1.0] + [float(torch.linalg.det(KERNEL[picks[:t]][:, picks[:t]])) for t in (1, 2, 3, 4)]
    gains = [after / before for before, after in itertools.pairwise(dets)]
    assert gains == pytest.approx([0.9, 0.7, 0.54921, 0.12948], abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_equals_greedy_by_determinants(seed):
    tables = kernels(3, 10, 12, seed)
    weight = torch.rand(3, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    weighted = weight[:, :, None] * tables * weight[:, None]
    assert choose(tables, 4) == [greedy_map_naive(table, 4) for table in tables]
    assert choose(tables, 4, weight=weight) == [greedy_map_naive(table, 4) for table in weighted]


def test_a_constant_weight_changes_nothing_and_fewer_picks_are_the_first_of_more():
    tables = kernels(2, 40, 64)
    all_of_them = choose(tables, 40)
    assert choose(tables, 40, weight=torch.full((2, 40), 0.3, dtype=torch.float64)) == all_of_them
    assert choose(tables, 12) == [row[:12] for row in all_of_them]


def test_of_an_identity_the_heaviest_are_taken():
    weight = torch.rand(2, 30, generator=torch.Generator().manual_seed(3))
    picks = choose(torch.eye(30).expand(2, -1, -1), 7, weight=weight)
    assert picks == weight.topk(7).indices.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_past_the_rank_nothing_is_taken_twice_and_the_heaviest_of_the_rest_come_next(dtype):
    x, _ = unit(torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(0), dtype=dtype))
    length, weight = torch.ones(2, 60, dtype=dtype), torch.linspace(1, 0.5, 60, dtype=dtype).expand(2, -1)
    picks = greedy_map(product_rows(x), length, 50, weight=weight)
    for own, item in zip(picks.tolist(), x, strict=True):
        assert len(set(own)) == 50
        assert torch.linalg.matrix_rank(item[own[:16]]) == 16
        rest = own[16:]
        assert rest == sorted(set(range(60)) - set(own[:16]))[:34]


def test_duplicates_are_not_taken_while_anything_else_is_left():
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    x[0, 10:] = 3 * x[0, :10]  # the same direction
    rows, _ = unit(x)
    picks = greedy_map(product_rows(rows), torch.ones(1, 20), 10, weight=torch.linspace(0.1, 1, 20)[None])
    assert {pick % 10 for pick in picks[0].tolist()} == set(range(10))


def test_equal_tokens_go_by_index_and_broken_ones_come_last():
    broken = torch.tensor([[True, False, False, True, False, False]])
    picks = choose(torch.ones(1, 6, 6), 6, broken=broken)
    assert picks == [[1, 2, 4, 5, 0, 3]]


def test_an_item_is_chosen_from_as_alone_and_nothing_waits_for_the_device():
    x, _ = unit(torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(2)))
    length, weight = torch.ones(3, 50), torch.rand(3, 50, generator=torch.Generator().manual_seed(4))
    with HostReads():
        together = greedy_map(TableRows(product(x, x)), length, 30, weight=weight)
    for i in range(3):
        alone = greedy_map(TableRows(product(x[i : i + 1], x[i : i + 1])), length[:1], 30, weight=weight[i : i + 1])
        assert torch.equal(together[i], alone[0])
