"""DivPrune by its card: greedy max–min of cosine distance, its prefix property, its guarantee, no duplicates."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.view import View
from winnow.methods.divprune import DivPrune
from winnow.parts import cosine

from .stubs import STUBS, ids, tokens


def _distances(x):
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return (1 - unit @ unit.T).tolist()


def _naive(x, k):
    """The card's greedy, in float64: the minimum over all that is selected is taken anew at each step."""
    distance, n = _distances(x), len(x)
    first = max(range(n), key=lambda j: (sorted(distance[i][j] for i in range(n))[1], -j))
    chosen = [first]
    while len(chosen) < k:
        rest = [j for j in range(n) if j not in chosen]
        chosen.append(max(rest, key=lambda j: (min(distance[i][j] for i in chosen), -j)))
    return sorted(chosen)


def _greedy(reduce):
    for seed in range(10):
        x = tokens(seed, 24, 8)
        for k in (1, 2, 5, 13, 24):
            assert ids(reduce(View.of(x), k)) == _naive(x[0], k)


@pytest.mark.system("divprune", "exact")
def test_equals_brute_force_greedy():
    _greedy(lambda view, k: DivPrune(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_brute_force_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _greedy(stub)


@pytest.mark.system("divprune", "exact")
@given(st.integers(0, 10_000))
def test_prefix_property(seed):
    view, before = View.of(tokens(seed, 15, 6)), set()
    for k in range(1, 16):
        now = set(ids(DivPrune(keep=k).reduce(view)))
        assert before < now
        assert len(now) == k
        before = now


@pytest.mark.system("divprune", "exact")
@pytest.mark.parametrize("seed", range(6))
def test_smallest_distance_is_at_least_half_of_the_optimum(seed):
    """The guarantee holds for metrics: the chord, whose order is that of the cosine distance."""
    x = tokens(seed, 10, 3)
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
    chord = torch.cdist(unit, unit)
    spread = lambda chosen: min(chord[i, j].item() for i, j in combinations(chosen, 2))  # noqa: E731
    for k in range(2, 7):
        best = max(spread(c) for c in combinations(range(10), k))
        assert spread(ids(DivPrune(keep=k).reduce(View.of(x)))) >= best / 2


def _no_duplicates(reduce, dtype=torch.float32):
    x = tokens(0, 6, 16)[:, [0, 0, 0, 1, 1, 2, 3, 4, 4, 5]].to(dtype)
    origin = [0, 0, 0, 1, 1, 2, 3, 4, 4, 5]
    for k in range(1, 7):
        assert len({origin[j] for j in ids(reduce(View.of(x), k))}) == k
    assert len(set(ids(reduce(View.of(x), 9)))) == 9


@pytest.mark.system("divprune", "exact")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_duplicates_are_never_picked_while_distinct_remain(dtype):
    _no_duplicates(lambda view, k: DivPrune(keep=k).reduce(view), dtype)


@pytest.mark.parametrize("stub", STUBS)
def test_duplicates_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _no_duplicates(stub)


def _covers_clusters(reduce):
    """8 clusters of very unequal size; k = 8 must touch each."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.nn.functional.normalize(torch.randn(8, 32, generator=generator), dim=-1)
        member = torch.arange(8).repeat_interleave(torch.tensor([60, 30, 10, 5, 3, 2, 1, 1]))
        x = centres[member] + 0.02 * torch.randn(len(member), 32, generator=generator)
        assert set(member[ids(reduce(View.of(x[None]), 8))].tolist()) == set(range(8))


@pytest.mark.system("divprune", "directional")
def test_covers_all_planted_clusters():
    _covers_clusters(lambda view, k: DivPrune(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_cover_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _covers_clusters(stub)


def test_above_the_table_limit_it_selects_the_same(monkeypatch):
    view = View.of(tokens(4, 50, 12, b=2))
    table = DivPrune(keep=20).reduce(view).index
    monkeypatch.setattr(cosine, "TABLE_LIMIT", 10)
    assert torch.equal(DivPrune(keep=20).reduce(view).index, table)


def test_broken_tokens_come_last_and_are_counted():
    x = tokens(0, 8)
    x[0, 2], x[0, 5, 3] = float("nan"), float("inf")
    view = View.of(x)
    assert not {2, 5} & set(ids(DivPrune(keep=6).reduce(view)))
    assert int(view.notes["nan_scores"]) == 2
    assert ids(DivPrune(keep=8).reduce(View.of(x))) == list(range(8))


def test_zero_tokens_are_no_error():
    x = tokens(0, 6)
    x[0, 1] = 0
    assert len(set(ids(DivPrune(keep=5).reduce(View.of(x))))) == 5


def test_released_default_is_a_share():
    assert DivPrune().reduce(View.of(tokens(0, 576, 8))).m == 56
