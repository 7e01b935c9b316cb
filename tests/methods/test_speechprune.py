"""SpeechPrune by its card: two phases, each half of what goes, in order; what is asked about is found in a sound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.sounds import longest_dropped, times_of
from winnow.core.view import View
from winnow.methods.speechprune import ALIKE, SEEN, SpeechPrune

from .claims import sounds as claims
from .directional import gap
from .sounds import heard
from .stubs import STUBS, ids, scores, tokens


def both(method, view, cosines, seen):
    """The tokens that are left of the first item behind both phases, and those behind the first."""
    first = method.similar(View(view.tokens, view.layout, view.ids, view.n_visual, {ALIKE: cosines}))
    held = first.index
    later = View(first.apply(view.tokens), view.layout, held, view.n_visual, {SEEN: seen.gather(1, held)}, n_lm=first.m)
    return (method.attended(later) @ first), first


def naive(cosines, seen, left, window):
    """The same for one item, over lists."""
    n, half = len(cosines), window // 2
    best = [max(row) for row in cosines]
    smooth = [sum(best[max(0, t - half) : t + half + 1]) / len(best[max(0, t - half) : t + half + 1]) for t in range(n)]
    first = sorted(sorted(range(n), key=lambda t: -smooth[t])[: left + (n - left) // 2])
    return sorted(sorted(first, key=lambda t: -seen[t])[:left]), first


@pytest.mark.system("speechprune", "exact")
@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("left", [1, 9, 20, 29, 30])
def test_both_phases_are_those_of_the_plain_loop(left, window):
    for seed in range(4):
        view = View.of(tokens(seed, 30, 4), layout=Layout.sound(30, 0.04))
        cosines = torch.rand(1, 30, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        seen = scores(seed + 9, 30)
        found, first = both(SpeechPrune(left=left, window=window), view, cosines, seen)
        want, kept = naive(cosines[0].double().tolist(), seen[0].tolist(), left, window)
        assert ids(found) == want
        assert ids(first) == kept


@pytest.mark.parametrize("stub", STUBS)
def test_the_plain_loop_tells_a_stub(stub):
    view, seen = View.of(tokens(0, 30, 4)), scores(9, 30)
    cosines = torch.rand(1, 30, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ids(stub(view, 9)) != naive(cosines[0].tolist(), seen[0].tolist(), 9, 5)[0]


@pytest.mark.system("speechprune", "exact")
def test_where_nothing_is_pruned_everything_stays():
    view = heard(0, "words").view
    found, first = both(SpeechPrune(left="100%"), view, torch.rand(1, view.n, 2), scores(0, view.n))
    assert ids(found) == ids(first) == list(range(view.n))


def test_it_acts_before_the_language_model_and_before_its_first_layer():
    _, steps = SpeechPrune().bind(ModelInfo(depth=4, points=("projected", "layers")))
    assert [str(step.at) for step in steps] == ["projected", "layers[0]"]
    assert SpeechPrune().at_budget("25%", 100) == SpeechPrune(left="25%")


@pytest.fixture(scope="module")
def asked():
    """For 40 sounds, evidence left at 20 %: by both phases, at random, and by phase 2 with words of no meaning."""
    sound_of, found, spans = claims.prototypes(), {"own": [], "random": [], "shuffled": []}, []
    for seed in range(40):
        one = heard(seed, "words")
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, one.view.n, generator=generator)
        kept = claims.both_phases(one, sound_of, noise)
        found["own"].append(claims.recall(kept, one.evidence))
        spans.append((Reduction.select(kept, one.view.n), one.view.layout))
        shuffled = sound_of[:, torch.randperm(sound_of.shape[1], generator=generator)]
        _, attention = claims.of_text(one.view.tokens, shuffled, noise)
        alone = SpeechPrune(left="20%").attended(claims.seen_by(one, {SEEN: attention}))
        found["shuffled"].append(claims.recall(alone.index[0], one.evidence))
        blind = torch.randperm(one.view.n, generator=generator)[: round(0.2 * one.view.n)]
        found["random"].append(claims.recall(blind, one.evidence))
    return {name: np.array(values) for name, values in found.items()}, spans


@pytest.mark.system("speechprune", "directional")
@pytest.mark.parametrize("other", ["random", "shuffled"])
def test_evidence_is_found_more_often_than_by_chance_and_than_without_the_question(asked, other):
    found, _ = asked
    assert gap(found["own"], found[other]).low > 0
    assert abs(found["random"].mean() - 0.2) < 0.05


def test_order_is_kept_and_the_longest_dropped_span_is_said(asked):
    """Pruning drops spans: of these sounds of 5 s, up to whole words with the silence around."""
    for kept, layout in asked[1]:
        assert times_of(kept, layout).diff().min() > 0
        gone = longest_dropped(kept, layout)
        assert 0.04 * 4 <= gone <= 0.8 * layout.seconds


def test_a_window_has_a_middle():
    with pytest.raises(WinnowError, match="odd"):
        SpeechPrune(window=4)


def test_a_broken_likeness_is_not_kept_and_does_not_reach_its_neighbours():
    cosines = torch.rand(1, 20, 3)
    cosines[0, 7, 1] = torch.nan
    view = View.of(tokens(0, 20, 4), {ALIKE: cosines})
    found = SpeechPrune(left=18).similar(view)
    assert found.m == 19
    assert 7 not in ids(found)
    assert int(view.notes["nan_scores"]) == 1
