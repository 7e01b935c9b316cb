"""Pooling a sound: torch's own operator where windows are full, and a last one that may be shorter."""

from __future__ import annotations

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.sounds import longest_dropped, times_of
from winnow.core.view import View
from winnow.methods.audio_pool import AudioPool

from .sounds import heard, runs
from .stubs import STUBS, tokens, uniform


@pytest.mark.system("audio-pool", "exact")
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_full_windows_are_pooled_as_torch_pools_them(k):
    x = tokens(0, 30, 8, b=2)
    found = AudioPool(k=k).reduce(View.of(x, layout=Layout.sound(30, 0.04)))
    want = torch.nn.functional.avg_pool1d(x.transpose(1, 2), k).transpose(1, 2)
    assert torch.allclose(found.apply(x), want, atol=1e-6)


@pytest.mark.system("audio-pool", "exact")
@pytest.mark.parametrize(("n", "k"), [(7, 3), (8, 3), (1, 4), (5, 9)])
def test_the_last_window_is_the_mean_of_what_it_has(n, k):
    view = View.of(tokens(1, n, 4), layout=Layout.sound(n, 0.04))
    found = AudioPool(k=k).reduce(view)
    windows = [list(range(s, min(s + k, n))) for s in range(0, n, k)]
    assert runs(found) == windows
    assert torch.allclose(found.apply(view.tokens)[0], torch.stack([view.tokens[0, w].mean(0) for w in windows]))
    assert found.representatives[0].tolist() == [w[(len(w) - 1) // 2] for w in windows]


@pytest.mark.parametrize("stub", STUBS)
def test_that_tells_a_stub(stub):
    view = View.of(tokens(1, 9, 4))
    assert not torch.allclose(stub(view, 3).apply(view.tokens), AudioPool(k=3).reduce(view).apply(view.tokens))


@pytest.mark.system("audio-pool", "exact")
def test_order_is_kept_and_times_ascend():
    for kind in ("tones", "words"):
        view = heard(0, kind).view
        found = AudioPool(k=4).reduce(view)
        assert [t for run in runs(found) for t in run] == list(range(view.n))
        times = times_of(found.lane(0), view.layout)
        assert times.diff().min() > 0
        assert times[0] == pytest.approx(0.08)


@pytest.mark.system("audio-pool", "directional")
def test_nothing_is_dropped_where_as_many_tokens_by_even_choice_drop_some():
    for seed in range(5):
        view = heard(seed, "words").view
        found = AudioPool(k=3).reduce(view)
        assert longest_dropped(found.lane(0), view.layout) == 0
        assert longest_dropped(uniform(view, found.m).lane(0), view.layout) >= 0.08 - 1e-9


def test_a_window_has_a_token():
    with pytest.raises(WinnowError, match="k"):
        AudioPool(k=0)
