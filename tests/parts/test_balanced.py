"""Rows that are alike, tokens that are merged, and frames that no two rows share."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.balanced import (
    duplicates_naive,
    duplicates_of,
    frames_apart,
    means_of_duplicates,
    merged_to,
    tokens_of_each,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(0, 199), st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0]))
def test_duplicates_are_those_of_the_walk(n, seed, threshold):
    rows = (random(n, 4, seed=seed) * 2).softmax(1)
    stays, to = duplicates_of(rows, threshold)
    groups = duplicates_naive(rows.tolist(), threshold)
    assert stays.nonzero()[:, 0].tolist() == [group[0] for group in groups]
    assert [(to == group[0]).nonzero()[:, 0].tolist() for group in groups] == groups
    means = means_of_duplicates(rows, stays, to)
    torch.testing.assert_close(means, torch.stack([rows[group].mean(0) for group in groups]))
    torch.testing.assert_close(means.sum(1), torch.ones(len(groups)))


def test_a_chain_joins_its_first_row_or_is_lost():
    angle = torch.tensor([0.0, 0.9, 1.8])  # neighbours are alike, the ends are not
    rows = torch.stack([angle.cos(), angle.sin()], 1)
    assert duplicates_of(rows, 0.75)[1].tolist() == [0, 0, 0]
    stays, to = duplicates_of(rows, 0.75, roots=False)
    assert to.tolist() == [0, 0, 1]
    torch.testing.assert_close(means_of_duplicates(rows, stays, to)[0], rows[:2].mean(0))


def test_the_likest_earlier_row_is_joined():
    rows = torch.tensor([[1.0, 0, 0.2], [0, 1.0, 0], [0.1, 1, 0.1], [1, 0.1, 0.2]])
    assert duplicates_of(rows, 0.75)[1].tolist() == [0, 1, 1, 0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 50))
def test_merging_gives_so_many_means_of_all_tokens(n, count, seed):
    x = random(3, n, 8, seed=seed)
    found, share = merged_to(x, count)
    assert found.shape == (3, min(n, count), 8)
    torch.testing.assert_close(share @ x, found)
    torch.testing.assert_close(share.sum(2), torch.ones(3, min(n, count)))
    assert (share > 0).any(1).all()
    if count >= n:
        assert torch.equal(found, x)


def test_merging_joins_the_most_alike():
    x = torch.tensor([[[1.0, 0], [0.99, 0.1], [0, 1.0], [-1, 0.0]]])
    found, _ = merged_to(x, 3)
    assert found[0].tolist() == [[0, 1], x[0, :2].mean(0).tolist(), [-1, 0]]


@given(st.integers(1, 20), st.data())
def test_frames_are_apart_and_as_wanted_where_they_can_be(frames, data):
    count = data.draw(st.integers(1, frames))
    wanted = sorted(data.draw(st.lists(st.integers(0, frames - 1), min_size=count, max_size=count)))
    found = frames_apart(wanted, frames)
    assert found == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < frames
    if len(set(wanted)) == count:
        assert found == wanted


def test_the_cap_is_spread_over_the_frames():
    assert tokens_of_each(576, 16, 32, 576) == 32
    assert tokens_of_each(256, 16, 32, 576) == 16
    assert [tokens_of_each(18, k, 8, 9) for k in range(1, 9)] == [8, 8, 6, 4, 3, 3, 2, 2]
    assert tokens_of_each(4, 9, 8, 9) == 1
