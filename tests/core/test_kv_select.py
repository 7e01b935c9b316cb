"""From scores to slots, under every kind of budget of the cache."""

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.kv import KVView
from winnow.core.kv_budget import KVBudget
from winnow.core.kv_select import best_slots


def view(b: int = 2, n: int = 12, **known) -> KVView:
    x = torch.randn(b, 2, n, 4, generator=torch.Generator().manual_seed(0))
    return KVView.of(x, x, **known)


def test_ties_go_to_the_earlier_slot_and_nan_is_the_last_choice():
    scores = torch.ones(1, 2, 12)
    scores[0, 0, 3] = torch.nan
    kept = best_slots(scores, KVBudget(4), view(1))
    assert kept.k.index[0].tolist() == [[0, 1, 2, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("keep", "count"), [(5, 5), ("50%", 6), (0.3, 3), ("[4,7]", None), ([4, 7], 7), ("100%", None)]
)
def test_counts_shares_and_layers(keep, count):
    if keep == "[4,7]":
        with pytest.raises(WinnowError, match="cannot be read"):
            KVBudget(keep)
        return
    kept = best_slots(torch.rand(2, 2, 12), KVBudget.parse(keep), view(layer=1, depth=2))
    assert (None if kept is None else kept.k.m) == count


def test_bytes_are_shared_by_layers_heads_and_samples():
    seen = view()  # 2 samples × 2 heads × (4 + 4) numbers of 4 bytes
    kept = best_slots(torch.rand(2, 2, 12), KVBudget("640B"), seen)
    assert kept.k.m == 640 // (2 * 2 * 8 * 4)


def test_a_share_of_the_mass_is_each_samples_own():
    scores = torch.full((2, 2, 12), 0.01)
    scores[0, :, 5] = 1.0  # one slot holds most of it
    scores[1] = 1.0  # all hold as much
    kept = best_slots(scores, KVBudget("mass=0.75"), view())
    assert kept.k.counts == (1, 1, 9, 9)
    assert kept.k.lane(0).index.tolist() == [[5], [5]]
    for row, count in ((0, 1), (1, 9)):
        alone = best_slots(scores[row : row + 1], KVBudget("mass=0.75"), view(1))
        assert alone.k.m == count
        assert torch.equal(alone.k.index[0], kept.k.lane(row).index)


def test_mass_of_negative_scores_is_refused():
    with pytest.raises(WinnowError, match="not negative"):
        best_slots(-torch.rand(2, 2, 12), KVBudget("mass=0.5"), view())


def test_each_kind_keeps_its_own_best():
    kinds = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]).expand(2, 2, 12)
    scores = torch.arange(12.0).expand(2, 2, 12)
    kept = best_slots(scores, KVBudget(("visual=50%", "text=100%")), view(kinds=kinds))
    assert kept.k.index[0, 0].tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11]
    with pytest.raises(WinnowError, match="not known here"):
        best_slots(scores, KVBudget(("visual=50%",)), view())


@pytest.mark.parametrize("bad", [0, -3, 1.5, "101%", "mass=0", "mass=2", "0MB", [], [0], ["smell=1"], ["text=0%"],
                                 ["visual=1", "image=2"], ["image=1MB"], True, None])  # fmt: skip
def test_what_is_no_budget_is_refused_with_what_is(bad):
    with pytest.raises(WinnowError, match="allowed"):
        KVBudget.parse(bad)
