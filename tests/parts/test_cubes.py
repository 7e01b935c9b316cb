"""Cubes: the fast forms and the plain ones."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.cubes import (
    cube_of,
    hardened,
    hardened_naive,
    momentum,
    sincos,
    softmax_in_cubes,
    softmax_in_cubes_naive,
    starts_of,
    summed_in_cubes,
    thumbnail_of,
    thumbnail_weights,
)

CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 12), st.integers(1, 11), st.integers(0, 99))
def test_borders_softmax_and_sums_are_those_of_the_plain_forms(t, borders, seed):
    borders = min(borders, t - 1)
    score = random(2, t - 1, seed=seed)
    begins = hardened(score, borders)
    starts, cube = starts_of(begins, borders + 1), cube_of(begins)
    logits, values = random(2, 3, t, 4, seed=seed + 1) * 9, random(2, t, 3, 5, seed=seed + 2)
    weights, sums = softmax_in_cubes(logits, cube), summed_in_cubes(values, cube, borders + 1)
    for i in range(2):
        own = hardened_naive(score[i].tolist(), borders)
        assert starts[i].tolist() == own
        assert begins[i].nonzero()[:, 0].tolist() == own
        torch.testing.assert_close(weights[i], softmax_in_cubes_naive(logits[i], own))
        for c, (s, e) in enumerate(zip(own, [*own[1:], t], strict=True)):
            torch.testing.assert_close(sums[i, c], values[i, s:e].sum(0))


def test_borders_carry_the_gradient_of_their_scores_and_are_whole_numbers():
    score = random(1, 6).requires_grad_()
    begins = hardened(score, 2)
    assert set(begins.tolist()[0]) == {0.0, 1.0}
    (begins[0] * torch.arange(7)).sum().backward()
    assert score.grad[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_of_equal_scores_the_first_begin_cubes():
    assert starts_of(hardened(torch.ones(1, 5), 2), 3).tolist() == [[0, 1, 2]]


def test_momentum_is_the_recursion_and_commutes_with_means():
    x = random(1, 5, 3, 4)
    m = momentum(x)
    assert torch.equal(m[:, 0], x[:, 1] - x[:, 0])
    for t in range(1, 4):
        torch.testing.assert_close(m[:, t], 0.8 * (x[:, t + 1] - x[:, t]) + 0.2 * m[:, t - 1])
    torch.testing.assert_close(momentum(x.mean(2)), m.mean(2))


def test_sines_tell_places_apart_and_have_any_even_width():
    at = torch.stack(torch.meshgrid(*[torch.arange(n).float() for n in (3, 4, 5)], indexing="ij"), -1).flatten(0, 2)
    for width in (16, 36, 48, 192):
        table = sincos(at, width)
        assert table.shape == (60, width)
        assert torch.cdist(table, table).fill_diagonal_(1).min() > 1e-3


def test_tokens_of_a_thumbnail_are_runs_of_neighbours():
    pooled = thumbnail_of(36, 9, CPU)
    assert torch.equal(pooled.nonzero()[:, 0], torch.arange(4).repeat_interleave(9))
    assert thumbnail_of(576, 9, CPU).sum(1).tolist() == [9] * 64
    assert thumbnail_of(20, 9, CPU).sum(1).tolist() == [10, 10]
    assert thumbnail_of(1, 9, CPU).shape == (0, 1)


def test_a_thumbnail_is_the_mean_of_first_frames_without_what_is_broken():
    begins, broken = torch.tensor([[1.0, 0, 1, 0]]), torch.zeros(1, 4, 6, dtype=torch.bool)
    broken[0, 2, 1] = True
    weights = thumbnail_weights(thumbnail_of(6, 3, CPU), begins, broken)
    assert (weights[0, [1, 3]] == 0).all()
    torch.testing.assert_close(weights[0, 0], torch.tensor([0.2] * 3 + [1 / 6] * 3))
    assert weights[0, 2, 1] == 0
