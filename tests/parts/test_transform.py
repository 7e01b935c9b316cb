"""Shares of tokens against their naive form, the means that they make, and what is restored of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.cosine import unit
from winnow.parts.transform import restored, shares, shares_naive, transform

from .test_select import HostReads


def _keys(seed, n, b=1, d=6):
    return unit(torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed)))[0]


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.05, 0.1, 1.0]), st.integers(0, 99))
def test_equals_its_naive_form(n, m, tau, seed):
    keys = _keys(seed, n, 2)
    kept = torch.stack(
        [torch.randperm(n, generator=torch.Generator().manual_seed(i))[:m].sort().values for i in (0, 1)]
    )
    found = shares(keys, kept, tau)
    for lane in range(2):
        want = shares_naive((keys[lane] @ keys[lane].T).tolist(), kept[lane].tolist(), tau)
        torch.testing.assert_close(found[lane], torch.tensor(want))


@pytest.mark.parametrize("anchor", [False, True])
@pytest.mark.parametrize("first_stays", [False, True])
def test_all_is_given_and_mass_is_conserved(anchor, first_stays):
    keys, kept = _keys(0, 15, 2), torch.tensor([[0, 3, 8, 9], [0, 1, 2, 14]])
    mass = torch.rand(2, 15, generator=torch.Generator().manual_seed(1)) + 0.5
    share = shares(keys, kept, 0.1, anchor=anchor, first_stays=first_stays)
    torch.testing.assert_close(share.sum(1), torch.ones(2, 15))
    matrix, total = transform(share, mass)
    torch.testing.assert_close(matrix.sum(2), torch.ones(2, 4))
    torch.testing.assert_close(total.sum(1), mass.sum(1))
    own = share.gather(2, kept[..., None])[..., 0]
    assert bool((own == 1).all()) == anchor
    if first_stays:
        assert share[:, 0].tolist() == share[:, :, 0].new_zeros(2, 15).index_fill(1, torch.tensor([0]), 1).tolist()
        assert (total[:, 0] == mass[:, 0]).all()


def test_towards_zero_everything_goes_to_the_most_similar():
    keys, kept = _keys(3, 12), torch.tensor([[1, 5, 7, 10]])
    hard = (keys[0][kept[0]] @ keys[0].T).argmax(0)
    share = shares(keys, kept, 0.001)
    torch.testing.assert_close(share[0], torch.nn.functional.one_hot(hard, 4).T.float(), atol=1e-3, rtol=0)
    everything = torch.arange(12)[None]
    matrix, total = transform(shares(keys, everything, 0.001), torch.ones(1, 12))
    torch.testing.assert_close(matrix[0], torch.eye(12))
    torch.testing.assert_close(total[0], torch.ones(12))


def test_broken_tokens_take_nothing_while_others_can():
    keys, broken = unit(torch.randn(1, 9, 4).index_fill(1, torch.tensor([2, 5]), torch.nan))
    share = shares(keys, torch.tensor([[0, 2, 6]]), 0.1, first_stays=True, broken=broken)
    assert share[0, 1].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert share[0, :, 5].tolist() == [0, 0, 1]
    alone = shares(keys, torch.tensor([[0, 2]]), 0.1, first_stays=True, broken=broken)
    assert alone[0, 1].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_items_of_a_batch_give_what_they_give_alone_and_nothing_is_read():
    tokens = torch.randn(3, 60, 16, generator=torch.Generator().manual_seed(2))
    kept = torch.arange(0, 60, 3).expand(3, -1)
    keys, broken = unit(tokens)
    with HostReads():
        together = transform(shares(keys, kept, 0.1, anchor=True, broken=broken), torch.ones(3, 60))[0]
    for i in range(3):
        alone, _ = transform(shares(unit(tokens[i : i + 1])[0], kept[:1], 0.1, anchor=True), torch.ones(1, 60))
        assert torch.equal(alone[0], together[i])


def test_restored_tokens_are_means_of_what_they_gave_to():
    share = torch.tensor([[[1.0, 0.25, 0], [0, 0.75, 1]]])
    assert restored(share, torch.tensor([[[4.0, 0], [0, 8]]])).tolist() == [[[4, 0], [1, 6], [0, 8]]]
