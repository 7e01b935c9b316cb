"""Cosine similarity of tokens, against the plain product."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.cosine import neighbours, table, unit


@pytest.mark.parametrize("n", [1, 2, 5, 7, 13, 64, 577])
def test_a_table_is_the_product_and_exactly_symmetric(n):
    x, _ = unit(torch.randn(2, n, 24, generator=torch.Generator().manual_seed(n)))
    found = table(x)
    for own, item in zip(found, x, strict=True):
        torch.testing.assert_close(own, item @ item.T)
        assert torch.equal(own, own.T)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_each_others_nearest_tie_exactly(n):
    x, _ = unit(torch.randn(3, n, 8, generator=torch.Generator().manual_seed(n)))
    rows, closest = neighbours(x)
    for lane, item in enumerate(x):
        alike = (item @ item.T).fill_diagonal_(-1)
        torch.testing.assert_close(closest[lane], alike.amax(1))
        pair = int(closest[lane].argmax())
        other = int(rows(torch.full((3, 1), pair))[lane].argmax())
        assert closest[lane, pair] == closest[lane, other]
