"""Selection by score: exact, stable, and unmoved by NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from winnow.core.select import comparable, ranked, top_k
from winnow.core.tiles import top_k_per_tile
from winnow.core.view import View
from winnow.testing import Picture

VALUES = st.sampled_from([math.nan, -math.inf, -1.0, -0.0, 0.0, 0.5, 0.5000001, 2.0, math.inf])


def _naive(row, k):
    clean = [-math.inf if math.isnan(x) else x for x in row]
    return sorted(sorted(range(len(row)), key=lambda j: (-clean[j], j))[:k])


@given(
    st.integers(1, 20).flatmap(lambda n: st.lists(st.lists(VALUES, min_size=n, max_size=n), min_size=1, max_size=3)),
    st.data(),
)
def test_equals_a_stable_sort_written_naively(rows, data):
    k = data.draw(st.integers(1, len(rows[0]) + 3))
    view = View.of(torch.zeros(len(rows), len(rows[0]), 1))
    found = top_k(torch.tensor(rows, dtype=torch.float32), k, view)
    assert found.index.dtype == torch.int64
    assert found.index.tolist() == [_naive([float(torch.tensor(x)) for x in row], k) for row in rows]
    assert int(view.notes["nan_scores"]) == sum(math.isnan(x) for row in rows for x in row)


def test_ties_go_to_the_lowest_index():
    assert top_k(torch.ones(2, 600), 3).index.tolist() == [[0, 1, 2]] * 2


def test_nan_is_kept_only_when_nothing_else_is_left():
    nan = math.nan
    assert top_k(torch.tensor([[nan, 0.1, nan, 0.2]]), 2).index.tolist() == [[1, 3]]
    assert top_k(torch.tensor([[nan, 0.1, nan, 0.2]]), 3).index.tolist() == [[0, 1, 3]]
    assert top_k(torch.full((1, 3), nan), 2).index.tolist() == [[0, 1]]


def test_counts_add_up_over_calls_and_stay_tensors():
    view = View.of(torch.zeros(1, 2, 1))
    for _ in range(2):
        comparable(torch.tensor([[math.nan, 1.0]]), view)
    assert isinstance(view.notes["nan_scores"], torch.Tensor)
    assert int(view.notes["nan_scores"]) == 2


def test_half_precision_is_compared_in_fp32_and_fp64_as_it_is():
    assert comparable(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert top_k(close, 1).index.tolist() == [[1]]
    assert top_k(close.float(), 1).index.tolist() == [[0]]


def test_integer_scores():
    assert top_k(torch.tensor([[3, 9, 5]]), 2).index.tolist() == [[1, 2]]


def test_scores_are_not_changed():
    row = torch.tensor([[math.nan, 1.0]])
    top_k(row, 1)
    assert row.isnan().tolist() == [[True, False]]


def test_ranked_is_best_first():
    assert ranked(torch.tensor([[0.1, 0.9, 0.9, 0.5]])).tolist() == [[1, 2, 3, 0]]


class HostReads(TorchDispatchMode):
    """Fails on the operations by which a number reaches the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            raise AssertionError(f"{name} reads from the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("picture", [Picture.grid(6, 5), Picture.tiled(4, 2, 1)], ids=lambda p: p.name)
def test_no_host_read(picture):
    view = View.of(torch.zeros(2, picture.lm.n, 1)[:, : picture.lm.n_content], layout=picture.lm)
    row = torch.rand(2, view.n, generator=torch.Generator().manual_seed(0))
    top_k_per_tile(row, 9, view)
    with HostReads():
        top_k_per_tile(row, 9, view)


def test_the_host_read_check_bites():
    with pytest.raises(AssertionError, match="reads from the device"), HostReads():
        torch.ones(1).item()
