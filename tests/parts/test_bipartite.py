"""Bipartite matching against its naive form, and the weights of what it merges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.bipartite import bipartite, bipartite_naive
from winnow.parts.cosine import product, unit
from winnow.parts.merge import weights_by_size

from .test_select import HostReads


def outputs(found, lane=0):
    """The outputs of one item as lists of tokens, its representative first."""
    lists = [[int(rep)] for rep in found.representative[lane]]
    for token, owner in enumerate(found.cluster[lane].tolist()):
        lists[owner] += [token] if token != lists[owner][0] else []
    return lists


def most(n, first_stays):
    return (n - first_stays) // 2


@given(st.integers(2, 13), st.integers(0, 6), st.booleans(), st.integers(0, 99))
def test_equals_its_naive_form(n, r, first_stays, seed):
    """Keys of small integers along few axes, so that ties are many."""
    keys = torch.randint(-1, 2, (2, n, 2), generator=torch.Generator().manual_seed(seed)).float()
    x, _ = unit(keys)
    r = min(r, most(n, first_stays))
    found = bipartite(x, r, torch.arange(n), first_stays)
    for lane in range(2):
        assert outputs(found, lane) == bipartite_naive((x[lane] @ x[lane].T).tolist(), r, first_stays)


def test_another_turn_is_the_matching_of_tokens_in_that_order():
    x, _ = unit(torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)))
    turn = torch.tensor([0, 5, 2, 8, 1, 3, 7, 4, 6])
    mapped = [[turn[i].item() for i in own] for own in outputs(bipartite([x[0][turn]], 3, torch.arange(9), True))]
    assert [sorted(own) for own in outputs(bipartite(x, 3, turn, True))] == [sorted(own) for own in mapped]


def test_by_likeness_the_best_unmerged_token_comes_first():
    x, _ = unit(torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(1)))
    likeness = product(x, x)[0]
    best = {a: max(float(likeness[a, b]) for b in range(1, 12, 2)) for a in range(0, 12, 2)}
    ranking = sorted(best, key=lambda a: -best[a])
    plain = bipartite(x, 2, torch.arange(12))
    by_likeness = bipartite(x, 2, torch.arange(12), by_likeness=True)
    assert plain.representative[0, :4].tolist() == sorted(ranking[2:]) != ranking[2:]
    assert by_likeness.representative[0, :4].tolist() == ranking[2:]
    assert sorted(map(sorted, outputs(plain))) == sorted(map(sorted, outputs(by_likeness)))
    first = bipartite(x, 2, torch.arange(12), True, by_likeness=True).representative[0, :4].tolist()
    assert first == sorted(first)


def test_broken_tokens_merge_last_and_the_first_never():
    keys = torch.ones(1, 9, 3)
    keys[0, [0, 2, 4, 1]] = torch.nan
    x, broken = unit(keys)
    for r in range(5):
        merged = [own[1:] for own in outputs(bipartite(x, r, torch.arange(9), True, broken=broken)) if len(own) > 1]
        assert sorted(i for own in merged for i in own) == sorted([6, 8, 2, 4][:r])
    one = outputs(bipartite(x, 2, torch.arange(9), True, broken=broken))
    assert [3, 6, 8] in one  # and not the broken one before it


@pytest.mark.parametrize("shape", [(7, 3), (64, 17), (577, 64)])
def test_items_of_a_batch_give_what_they_give_alone(shape):
    keys = torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))
    turn = torch.arange(shape[0])
    together = bipartite(unit(keys)[0], shape[0] // 3, turn, True)
    for i in range(3):
        alone = bipartite(unit(keys[i : i + 1])[0], shape[0] // 3, turn, True)
        assert torch.equal(alone.cluster[0], together.cluster[i])
        assert torch.equal(alone.representative[0], together.representative[i])


def test_no_host_read():
    x, broken = unit(torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)))
    with HostReads():
        found = bipartite(x, 10, torch.arange(30), True, broken=broken)
        weights_by_size(found.cluster, torch.ones(2, 30), 20)


def test_weights_are_shares_of_the_size():
    cluster = torch.tensor([[0, 1, 1, 0, 1]])
    weight, total = weights_by_size(cluster, torch.tensor([[1.0, 2, 1, 3, 5]]), 3)
    assert total.tolist() == [[4, 8, 0]]
    assert weight.tolist() == [[0.25, 0.25, 0.125, 0.75, 0.625]]
