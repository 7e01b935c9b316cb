"""Counts that are learned: whole numbers going forward, expectations going back."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.learned_budget import LearnedBudget, Schedule


def budget(seed=0, total=31, step=3):
    made = LearnedBudget(total, step)
    torch.nn.init.normal_(made.logits, generator=torch.Generator().manual_seed(seed))
    return made


def test_the_count_is_the_expectation_rounded_up():
    for seed in range(5):
        made = budget(seed)
        chance = made.logits.exp() / made.logits.exp().sum()
        naive = sum(p * n for p, n in zip(chance.tolist(), range(31, 0, -3), strict=True))
        assert made.number() == int(made.count()) == -int(-(naive - 1e-3) // 1)
        assert abs(made.expected().item() - naive) < 1e-4


def test_a_mask_goes_forward_as_ranks_below_the_count_and_back_as_the_chance_to_be_kept():
    made = budget(1)
    rank = torch.tensor([[5, 0, 30], [12, 25, 3]])
    mask = made.mask(rank)
    assert torch.equal(mask.detach(), (rank < made.number()).float())
    weight = torch.tensor([[1.0, -2, 3], [0.5, 4, -1]])
    (got,) = torch.autograd.grad((weight * mask).sum(), made.logits)
    chance = made.logits.softmax(0)
    survives = sum(
        weight[i, j] * sum(p for p, n in zip(chance, range(31, 0, -3), strict=True) if n > rank[i, j])
        for i in range(2)
        for j in range(3)
    )
    (want,) = torch.autograd.grad(survives, made.logits)
    torch.testing.assert_close(got, want)


def test_all_mass_on_all_tokens_keeps_them_in_a_schedule():
    schedule = Schedule(20, 4)
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter[0] = 1e3
    assert schedule.counts() == ((20,) * 4, (20,) * 4)


@pytest.mark.parametrize("seed", range(4))
def test_a_schedule_never_grows_and_merges_behind_pruning(seed):
    schedule = Schedule(40, 5)
    generator = torch.Generator().manual_seed(seed)
    for parameter in schedule.parameters():
        torch.nn.init.normal_(parameter, std=3, generator=generator)
    prune, merge = schedule.counts()
    assert prune[0] == merge[0] == 40
    for block in range(1, 5):
        assert 1 <= merge[block] <= prune[block] <= merge[block - 1]
