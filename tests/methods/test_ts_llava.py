"""TS-LLaVA by its card: what is sampled, how it drifts over the places of frames, and the thumbnail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.ts_llava import TSLLaVA
from winnow.parts.evenly import evenly
from winnow.testing import Picture

from .stubs import STUBS, ids, tokens

T, H, W = 6, 4, 5
P = H * W
FRAMES, SIDE, SAMPLED, SHOWN = 50, 24, 2880, 6  # of the paper
CELLS = SIDE * SIDE


def clip(t=T, h=H, w=W, b=1):
    return View.of(torch.zeros(b, t * h * w, 2), layout=Layout.grid(h, w, t))


def released(keep):
    (method,) = Plan.of(f"ts-llava:released,keep={keep}").methods
    return method


def as_in_the_code(n, s):
    """The sampling of the code: a linspace in fp32, rounded."""
    return torch.clamp(torch.round(torch.linspace(0, n - 1, steps=s)).long(), 0, n - 1).tolist()


@pytest.mark.system("ts-llava", "exact")
@pytest.mark.parametrize("sampled", [1, 2, 576, 1728, 2304, 2880])
@pytest.mark.parametrize("frames", [6, 16, 50])
def test_as_released_it_takes_what_the_code_takes(frames, sampled):
    view = clip(frames, SIDE, SIDE)
    assert ids(released(sampled).reduce(view)) == as_in_the_code(frames * CELLS, sampled)


@pytest.mark.system("ts-llava", "exact")
def test_as_many_as_there_are_is_all_of_them():
    for keep in (T * P, T * P + 9, "100%"):
        assert ids(TSLLaVA(keep=keep).reduce(clip())) == list(range(T * P))
        assert ids(released(keep).reduce(clip())) == list(range(T * P))


@pytest.mark.system("ts-llava", "exact")
@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_the_first_and_the_last_stay_and_every_frame_has_its_share(frames, places, data):
    keep = data.draw(st.integers(2, max(2, frames * places)))
    view = View.of(torch.zeros(1, frames * places, 1), layout=Layout.grid(1, places, frames))
    kept = ids(TSLLaVA(keep=keep).reduce(view))
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    assert kept[-1] == frames * places - 1
    each = torch.tensor(kept).div(places, rounding_mode="floor").bincount(minlength=frames)
    assert bool((each.float() - len(kept) / frames).abs().max() <= 2)  # floor or ceiling, and one more or less


def drifts(reduce):
    """Every frame has a tenth of its tokens left, and over all frames more than 90 % of the places are seen."""
    kept = torch.tensor(ids(reduce(clip(FRAMES, SIDE, SIDE), SAMPLED)))
    each = kept.div(CELLS, rounding_mode="floor").bincount(minlength=FRAMES)
    assert 56 <= int(each.min()) <= int(each.max()) <= 59
    assert len((kept % CELLS).unique()) > 0.9 * CELLS


@pytest.mark.system("ts-llava", "exact")
def test_what_is_taken_drifts_over_the_places_of_a_frame():
    drifts(lambda view, k: TSLLaVA(keep=k).reduce(view))


def same_places(view, k):
    """The same places of every frame: a tenth of them."""
    own = torch.arange(57) * CELLS // 57
    chosen = (torch.arange(FRAMES)[:, None] * CELLS + own).flatten()
    return STUBS[0](view, 1).select(chosen.expand(view.b, -1), view.n)


@pytest.mark.parametrize("stub", [STUBS[0], same_places])
def test_the_drift_tells_a_stub(stub):
    with pytest.raises(AssertionError):
        drifts(stub)


def events(reduce, thumbnail):
    """The share of events, 2 × 2 cells in one frame, of which a token stays or whose frame the thumbnail shows."""
    kept = torch.zeros(FRAMES, SIDE, SIDE, dtype=torch.bool)
    kept.view(-1)[[j for j in ids(reduce(clip(FRAMES, SIDE, SIDE), SAMPLED)) if j < FRAMES * CELLS]] = True
    seen = kept[:, 1:, 1:] | kept[:, :-1, 1:] | kept[:, 1:, :-1] | kept[:, :-1, :-1]
    if thumbnail:
        seen[evenly(FRAMES, SHOWN)] = True
    return float(seen.float().mean())


@pytest.mark.system("ts-llava", "directional")
def test_sampled_tokens_and_a_thumbnail_together_show_more_events_than_each():
    """By chance 1 − 0.9⁴ = 0.34 of the events keep a token; a thumbnail alone shows 6 of 50."""
    sample = lambda view, k: TSLLaVA(keep=k).reduce(view)  # noqa: E731
    alone, both = events(sample, False), events(sample, True)
    assert 0.34 <= alone <= 0.42
    assert both > alone + 0.05
    assert both > SHOWN / FRAMES + 0.25
    assert events(STUBS[0], False) < 0.11
    assert events(STUBS[0], True) < alone


@pytest.mark.system("ts-llava", "exact")
@pytest.mark.parametrize(("where", "thumb"), [("last", T - 1), ("first", 0)])
def test_a_thumbnail_among_the_frames_stays_whole(where, thumb):
    view = clip(b=2)
    for keep in (P, P + 1, P + 7, 3 * P, T * P):
        found = TSLLaVA(keep=keep, thumbnail=where).reduce(view)
        own = list(range(thumb * P, (thumb + 1) * P))
        others = [j for j in range(T * P) if j not in own]
        rest = [others[j] for j in evenly(len(others), keep - P).tolist()] if keep > P else []
        for lane in range(2):
            assert ids(found, lane) == sorted(own + rest)


def test_a_thumbnail_that_is_more_than_all_that_stays_is_thinned():
    kept = ids(TSLLaVA(keep=5, thumbnail="last").reduce(clip()))
    assert kept == [(T - 1) * P + j for j in evenly(P, 5).tolist()]


def test_a_picture_is_sampled_wherever_the_thumbnail_is():
    for where in ("apart", "last", "first"):
        assert ids(TSLLaVA(keep=4, thumbnail=where).reduce(clip(1))) == evenly(P, 4).tolist()
        tiled = View.of(tokens(0, 48), layout=Picture.tiled(4, 2, 1).lm)
        assert ids(TSLLaVA(keep=9, thumbnail=where).reduce(tiled)) == evenly(48, 9).tolist()


def test_after_an_earlier_method_what_is_left_is_sampled():
    view = clip()
    part = replace(view, tokens=view.tokens[:, 3:], ids=view.ids[:, 3:])
    assert ids(TSLLaVA(keep=9).reduce(part)) == evenly(T * P - 3, 9).tolist()
    with pytest.raises(WinnowError, match="ts-llava needs a token at each of 20 places"):
        TSLLaVA(keep=9, thumbnail="last").reduce(part)


def test_bad_settings_say_what_is_allowed():
    with pytest.raises(WinnowError, match="apart"):
        TSLLaVA(thumbnail="middle")
    with pytest.raises(WinnowError, match="exact"):
        TSLLaVA(spacing="half")
