"""A-ToMe by its card: neighbours alone, the most alike first, order and times kept, never across a change of tone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from methods.byhand.a_tome import joined
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.sounds import longest_dropped, times_of
from winnow.core.view import View
from winnow.methods.a_tome import AToMe, rounds_to
from winnow.methods.audio_pool import AudioPool

from .directional import gap
from .sounds import crossed, heard, runs
from .stubs import STUBS, tokens


@pytest.mark.system("a-tome", "exact")
@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("keep", [1, 2, "30%", "57%", "100%"])
def test_it_merges_as_the_plain_loop_does(n, keep):
    for seed in range(3):
        view = View.of(tokens(seed, n, 6), layout=Layout.sound(n, 0.04))
        found = AToMe(keep=keep).reduce(view)
        want = joined(view.tokens[0], found.m)
        assert runs(found) == want
        assert torch.allclose(found.apply(view.tokens)[0], torch.stack([view.tokens[0, run].mean(0) for run in want]))


@pytest.mark.parametrize("stub", STUBS)
def test_the_plain_loop_tells_a_stub(stub):
    view = View.of(tokens(0, 40, 6))
    assert runs(stub(view, 12)) != joined(view.tokens[0], 12)


def test_every_round_can_be_done_whatever_the_sound():
    for n in range(1, 60):
        for keep in range(1, n + 1):
            left = n
            for pairs in rounds_to(n, keep):
                assert 1 <= pairs <= -(-(left - 1) // 3)
                left -= pairs
            assert left == keep


def in_order(reduction, layout):
    """Every token once, neighbours together, and times that ascend."""
    flat = [t for run in runs(reduction) for t in run]
    assert flat == list(range(layout.n))
    assert reduction.representatives[0].diff().min() > 0
    times = times_of(reduction.lane(0), layout)
    assert times.diff().min() > 0
    assert longest_dropped(reduction.lane(0), layout) == 0


@pytest.mark.system("a-tome", "exact")
@pytest.mark.parametrize("kind", ["tones", "rhythm", "words", "events"])
@pytest.mark.parametrize("settings", [{"keep": "20%"}, {"keep": 3}, {"threshold": 0.9, "rounds": 4}])
def test_order_is_kept_times_ascend_and_nothing_is_dropped(kind, settings):
    for seed in range(4):
        own = heard(seed, kind)
        in_order(AToMe(**settings).reduce(own.view), own.view.layout)


def inside_and_never_across(reduce):
    """At a cosine of 0.9: tones and silences shrink, and no change of tone lies inside an output."""
    for seed in range(20):
        own = heard(seed, "tones")
        found = reduce(own.view)
        assert crossed(found, own.changes) == 0
        assert found.lane(0).m < 0.6 * own.view.n
        edges = [0, *own.changes, own.view.n]
        inside = [run for run in runs(found) if len(run) > 1]
        for start, stop in pairwise(edges):
            if stop - start >= 5:
                assert any(start <= run[0] and run[-1] < stop for run in inside), (seed, start, stop)


@pytest.mark.system("a-tome", "exact")
def test_it_merges_inside_tones_and_silence_and_never_across_a_change():
    inside_and_never_across(lambda view: AToMe(threshold=0.9, rounds=3).reduce(view))


@pytest.mark.parametrize("stub", [AudioPool(k=2), AToMe(keep="40%", threshold=-1.0, rounds=2)], ids=["pool", "any"])
def test_what_merges_whatever_is_next_goes_across(stub):
    with pytest.raises(AssertionError):
        inside_and_never_across(stub.reduce)


@pytest.mark.system("a-tome", "exact")
@pytest.mark.parametrize("settings", [{"keep": "100%"}, {"threshold": 1.0, "rounds": 3}])
def test_it_has_two_identities(settings):
    for view in (heard(0, "tones").view, View.of(torch.ones(2, 9, 4))):
        found = AToMe(**settings).reduce(view)
        assert found.is_selection
        assert found.index.tolist() == [list(range(view.n))] * view.b


def test_a_threshold_takes_any_number_of_items():
    view = View.of(torch.cat([tokens(0, 30, 4), torch.ones(1, 30, 4)]))
    found = AToMe(threshold=0.5, rounds=9).reduce(view)
    assert found.counts == (found.lane(0).m, 1)
    for i in range(2):
        alone = AToMe(threshold=0.5, rounds=9).reduce(View.of(view.tokens[i : i + 1]))
        assert torch.equal(alone.lane(0).to_matrix(), found.lane(i).to_matrix())


@pytest.mark.system("a-tome", "directional")
def test_at_as_many_tokens_fewer_changes_are_blurred_than_by_pooling():
    """43 % of the tokens, which is what the paper's largest figure leaves."""
    own, pooled = [], []
    for seed in range(40):
        one = heard(seed, "tones")
        count = len(one.changes)
        pool = AudioPool(k=3).reduce(one.view)
        own.append(1 - crossed(AToMe(keep=pool.m).reduce(one.view), one.changes) / count)
        pooled.append(1 - crossed(pool, one.changes) / count)
    assert gap(np.array(own), np.array(pooled)).low > 0


def test_a_threshold_is_a_cosine():
    with pytest.raises(WinnowError, match="threshold"):
        AToMe(threshold=2.0)
