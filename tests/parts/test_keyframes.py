"""Keyframes beside a loop over frames, parts of a grid beside loops over their places, and the learned module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.parts.condensed import means_of, parts_naive, parts_of
from winnow.parts.keyframes import keyframes, keyframes_naive, likeness, regions_of, so_many_keyframes, with_context
from winnow.parts.spatiotemporal import SpatioTemporal


def table(seed: int, t: int) -> torch.Tensor:
    return likeness(torch.randn(1, t, 3, 4, generator=torch.Generator().manual_seed(seed)))[0]


def test_likeness_is_the_mean_cosine_of_regions():
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = likeness(x)
    for b, s, t in torch.cartesian_prod(*map(torch.arange, (2, 5, 5))).tolist():
        assert float(found[b, s, t]) == pytest.approx(float(torch.cosine_similarity(x[b, s], x[b, t]).mean()), abs=1e-6)
    x[0, 2] = torch.nan
    assert float(likeness(x)[0, 2].abs().max()) == 0


@given(st.integers(1, 12), st.integers(0, 50), st.floats(-1.1, 1.1), st.integers(0, 4))
def test_keyframes_are_those_of_a_loop(t, seed, threshold, longest):
    alike = table(seed, t)
    found = keyframes(alike[None], torch.tensor([threshold]), longest)
    last = keyframes_naive(alike.tolist(), float(torch.tensor(threshold)), longest)
    assert found.key[0].nonzero()[:, 0].tolist() == last
    for now in range(1, t):
        assert float(found.repeats[0, now]) == float(alike[now, max(k for k in last if k < now)])


@given(st.integers(1, 12), st.integers(0, 50), st.data())
def test_so_many_keyframes_are_that_many(t, seed, data):
    count = data.draw(st.integers(1, t))
    found = so_many_keyframes(table(seed, t), count)
    assert int(found.key.sum()) == count
    assert bool(found.key[0, 0])


def test_so_many_keyframes_of_frames_that_are_all_equal_are_the_first():
    assert so_many_keyframes(torch.ones(6, 6), 3).key[0].tolist() == [True] * 3 + [False] * 3


def test_frames_between_keyframes_are_at_equal_distances():
    key = [t in (0, 10, 12) for t in range(14)]
    assert with_context(key, 0) == [0, 10, 12]
    assert with_context(key, 3) == [0, 2, 5, 8, 10, 11, 12, 13]
    assert with_context(key, 99) == list(range(14))


def places(h: int, w: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(h), torch.arange(w)).reshape(-1, 2)


@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_parts_are_those_of_loops_and_none_is_empty(h, w, data):
    count = data.draw(st.integers(1, h * w))
    part = parts_of(torch.tensor([count]), places(h, w), (h, w))
    want = parts_naive(count, h, w)
    assert len(want) == count
    for number, own in enumerate(want):
        assert [(j // w, j % w) for j in (part == number).nonzero()[:, 0].tolist()] == list(own) != []


def test_a_square_number_of_a_square_is_squares():
    part = parts_of(torch.tensor([4]), places(6, 6), (6, 6)).view(6, 6)
    assert part.tolist() == [[0] * 3 + [1] * 3] * 3 + [[2] * 3 + [3] * 3] * 3


def test_means_leave_out_what_is_broken_and_what_is_dropped():
    part = torch.tensor([[1, 1, 0, 0, -1, 2]])
    broken = torch.tensor([[True, False, False, False, False, True]])
    found = means_of(part, broken, 3)
    assert found.representatives.tolist() == [[1, 2, 5]]
    assert found.to_matrix()[0].tolist() == [
        [0, 1, 0, 0, 0, 0],
        [0, 0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_regions_are_as_many_as_there_are_rows_and_columns():
    assert regions_of(places(2, 3), (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert regions_of(places(8, 8), (8, 8)).bincount().tolist() == [4] * 16


def test_the_learned_module_starts_as_it_is_and_each_attention_reaches_what_it_should():
    torch.manual_seed(0)
    module, x = SpatioTemporal(8, (4, 3, 3), heads=2).eval(), torch.randn(2, 3, 2, 2, 8)
    assert torch.equal(module(x), x)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # wide ones saturate the softmax, and nothing reaches another frame
    moved = x.clone()
    moved[0, 1, 0, 0] += torch.randn(8)
    change = (module(moved) - module(x)).abs().amax(-1) > 1e-5
    assert bool(change[0].all())  # by the means of frames
    assert not bool(change[1].any())
    torch.nn.init.zeros_(module.over_frames.out_proj.weight)
    torch.nn.init.zeros_(module.over_frames.out_proj.bias)
    change = (module(moved) - module(x)).abs().amax(-1) > 1e-5
    assert change[0].flatten(1).all(1).tolist() == [False, True, False]
    assert not bool(change[0, [0, 2]].any())


def test_a_clip_or_heads_that_do_not_fit_are_refused():
    with pytest.raises(WinnowError, match="no multiple of heads=3"):
        SpatioTemporal(8, (4, 3, 3), heads=3)
    with pytest.raises(WinnowError, match=r"\(5, 3, 3\) frames"):
        SpatioTemporal(8, (4, 3, 3), heads=2)(torch.zeros(1, 5, 3, 3, 8))
