"""Segments by their rule: borders at local maxima of change, all changes of tone among them, means in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.byhand.audio_segments import segments
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.sounds import longest_dropped, times_of
from winnow.core.view import View
from winnow.methods.audio_segments import AudioSegments, peaks

from .directional import gap
from .sounds import crossed, heard, runs
from .stubs import tokens


@pytest.mark.system("audio-segments", "exact")
@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("least", [0.0, 0.8, 2.0])
def test_borders_are_those_of_the_plain_loop(n, least):
    for seed in range(5):
        view = View.of(tokens(seed, n, 6), layout=Layout.sound(n, 0.04))
        assert runs(AudioSegments(least=least).reduce(view)) == segments(view.tokens[0], least)


def test_of_equal_changes_in_a_row_the_first_is_the_border():
    change = torch.tensor([[0.0, 1, 1, 1, 0, 2, 0]])
    assert peaks(change)[0].nonzero()[:, 0].tolist() == [1, 5]
    assert not peaks(torch.zeros(1, 4))[0, 1:].any()


@pytest.mark.system("audio-segments", "exact")
def test_all_changes_of_tone_are_found():
    """Tokens that are one tone each: with as many segments as tones, the borders are the changes and nothing else."""
    for seed in range(20):
        view, changes = tones(seed)
        assert crossed(AudioSegments().reduce(view), changes) == 0
        few = AudioSegments(keep=len(changes) + 1).reduce(view)
        assert [run[0] for run in runs(few)][1:] == changes


def tones(seed: int):
    """A few tones and silences with noise, and the tokens with which they begin."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (6,), generator=generator).tolist()
    tone = torch.randn(6, 16, generator=generator).repeat_interleave(torch.tensor(lengths), 0)
    x = tone + 0.1 * torch.randn(tone.shape, generator=generator)
    return View.of(x[None], layout=Layout.sound(len(x), 0.04)), np.cumsum(lengths)[:-1].tolist()


@pytest.mark.system("audio-segments", "exact")
def test_in_waves_all_changes_are_found_to_a_token():
    """A window of the spectrum reaches over the edge of a token, so that the sharpest change may be one beside it."""
    for seed in range(20):
        own = heard(seed, "tones")
        for method in (AudioSegments(), AudioSegments(keep=2 * len(own.changes))):
            starts = [run[0] for run in runs(method.reduce(own.view))]
            assert all(min(abs(start - at) for start in starts) <= 1 for at in own.changes), seed


def test_windows_of_equal_length_do_not_find_them():
    for seed in range(20):
        view, changes = tones(seed)
        starts = np.linspace(0, view.n, len(changes) + 2)[1:-1].round().astype(int)
        assert starts.tolist() != changes


@pytest.mark.system("audio-segments", "exact")
@pytest.mark.parametrize("settings", [{}, {"keep": "25%"}, {"keep": 2}, {"least": 0.1}])
def test_order_is_kept_times_ascend_and_nothing_is_dropped(settings):
    for kind in ("tones", "words", "rhythm", "events"):
        view = heard(1, kind).view
        found = AudioSegments(**settings).reduce(view)
        assert [t for run in runs(found) for t in run] == list(range(view.n))
        assert times_of(found.lane(0), view.layout).diff().min() > 0
        assert longest_dropped(found.lane(0), view.layout) == 0


@pytest.mark.system("audio-segments", "exact")
def test_a_budget_keeps_the_sharpest_borders_and_fills_up_with_other_changes():
    view = heard(3, "words").view
    borders = {run[0] for run in runs(AudioSegments().reduce(view))} - {0}
    x = torch.nn.functional.normalize(view.tokens[0].double(), dim=-1)
    change = {t: float(1 - x[t - 1] @ x[t]) for t in range(1, view.n)}
    for keep in (2, len(borders), len(borders) + 1, len(borders) + 5, view.n):
        found = {run[0] for run in runs(AudioSegments(keep=keep).reduce(view))} - {0}
        rest = set(change) - borders
        sharp = sorted(borders, key=lambda t: -change[t]) + sorted(rest, key=lambda t: -change[t])
        assert found == set(sharp[: keep - 1])


def test_unequal_items_are_ragged():
    own = heard(0, "tones").view
    flat = torch.ones_like(own.tokens)
    found = AudioSegments(least=0.01).reduce(View.of(torch.cat([own.tokens, flat])))
    assert found.lane(1).m == 1
    assert found.lane(0).m == AudioSegments(least=0.01).reduce(own).m > 1


@pytest.mark.system("audio-segments", "directional")
def test_segments_are_more_of_one_kind_than_windows_of_equal_length():
    """What is lost is what a mean does not say: the variance inside, at as many tokens."""
    own, equal = [], []
    for seed in range(30):
        view = heard(seed, "words").view
        found = AudioSegments(keep="25%").reduce(view)
        x = view.tokens[0]
        windows = [part.tolist() for part in torch.arange(view.n).tensor_split(found.m)]
        own.append(lost(x, runs(found)))
        equal.append(lost(x, windows))
    assert gap(np.array(equal), np.array(own)).low > 0


def lost(x, parts) -> float:
    inside = sum(float((x[part] - x[part].mean(0)).square().sum()) for part in parts)
    return inside / float(x.square().sum())


def test_a_change_is_at_most_two():
    with pytest.raises(WinnowError, match="least"):
        AudioSegments(least=3.0)
