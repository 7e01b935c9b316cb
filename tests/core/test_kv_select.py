"""Slots by score where the budget is smaller than what always stays."""

import pytest
import torch

from winnow.contract import KVBudget, KVView, best_slots


@pytest.mark.parametrize(
    ("count", "kept"),
    [(2, [8, 9]), (3, [7, 8, 9]), (4, [0, 7, 8, 9]), (5, [0, 1, 7, 8, 9]), (6, [0, 1, 5, 7, 8, 9])],
)
def test_the_latest_slots_go_before_the_sinks(count: int, kept: list[int]) -> None:
    x = torch.zeros(1, 2, 10, 4)
    scores = torch.zeros(1, 2, 10)
    scores[..., 5] = 1
    found = best_slots(scores, KVBudget(count), KVView.of(x, x), first=2, last=3)
    assert found is not None
    assert found.k.representatives.tolist() == [[kept, kept]]
