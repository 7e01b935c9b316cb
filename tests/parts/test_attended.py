"""What globally attended tokens look at, and the entropy of pixels, against plain forms."""

from __future__ import annotations

import math

import pytest
import torch

from winnow.parts.attended import global_rows, global_rows_naive, grey_entropy, softmax_in_groups
from winnow.signals.attention import column_mean


def drawn(n: int, prefix: int, seed: int = 0, tiles: int = 3):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(tiles, 4, n + prefix, 8, generator=g) * 2 for _ in range(2))
    return q, k, column_mean(q, k, 0.5).mean(1)[:, prefix:]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0, 1.7, 3.0, 50.0])
@pytest.mark.parametrize(("n", "prefix"), [(1, 0), (40, 1), (150, 0)])
def test_rows_equal_those_of_the_whole_matrix(n, prefix, threshold):
    q, k, received = drawn(n, prefix)
    found = global_rows(q, k, 0.5, received, threshold)
    assert torch.allclose(found, global_rows_naive(q, k, 0.5, received, threshold), atol=1e-6)


def test_without_a_patch_above_the_threshold_the_first_is_global():
    q, k, received = drawn(40, 0)
    row = (q[0, :, received[0].argmax()][:, None] @ k[0].mT * 0.5).softmax(-1).mean(0)[0]
    assert torch.allclose(global_rows(q, k, 0.5, received, 39.9)[0], row, atol=1e-6)


def test_entropy_in_bits():
    half = torch.tensor([[0.0, 1.0] * 8, [0.2] * 16, [i / 255 for i in range(16)], [-3.0, 7.0] * 8])
    assert grey_entropy(half).tolist() == pytest.approx([1, 0, 4, 1], abs=1e-5)


def test_softmax_in_groups_is_that_of_each_group():
    x = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)) * 30
    group = torch.tensor([[0, 1, 0, 1, 1, 2, 0]] * 2)
    found = softmax_in_groups(x, group)
    for g in range(3):
        assert torch.allclose(found[:, group[0] == g], x[:, group[0] == g].softmax(1), atol=1e-6)
    broken = softmax_in_groups(torch.tensor([[-math.inf, 0.0, -math.inf]]), torch.tensor([[0, 0, 1]]))
    assert broken.tolist() == [[0.0, 1.0, 0.0]]
