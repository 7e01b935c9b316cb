"""KFFocus by its card: keyframes at cuts and in slow fades, what frames become, and budgets that are met."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given
from hypothesis import strategies as st
from probes import generate
from video_processor import VideoProcessor

import winnow
from winnow.contract import FramesView, State
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.methods.kffocus import KFFocus
from winnow.models.inputs import model_inputs
from winnow.parts.evenly import evenly
from winnow.testing import Picture
from winnow.video import Video

from .stubs import ids, tokens

H, W = 4, 6
P = H * W


def view_of(frames: np.ndarray, features: torch.Tensor | None = None) -> FramesView:
    return FramesView(torch.from_numpy(frames)[None], torch.arange(len(frames))[None].float(), features)


def chosen(method: KFFocus, view: FramesView) -> list[int]:
    return method.choose(view, State()).reduction.index[0].tolist()


def scenes(cuts, n, seed=0, noise=3):
    """Frames of noise that is new at each cut, and a little other noise in every frame."""
    random, frames = np.random.default_rng(seed), []
    for t in range(n):
        if t == 0 or t in cuts:
            still = random.integers(0, 256, (16, 16, 3)).astype(float)
        frames.append((still + noise * random.standard_normal(still.shape)).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


@pytest.mark.system("kffocus", "exact")
@pytest.mark.parametrize("cuts", [(), (7,), (3, 4, 11), (5, 9, 14, 20)])
def test_keyframes_are_where_the_picture_is_cut(cuts):
    method = KFFocus(longest=0, context=0)
    assert chosen(method, view_of(scenes(cuts, 24))) == [0, *cuts]


def fade(n=24):
    """From dark to bright, in steps that are all small."""
    return np.stack([np.full((16, 16, 3), 40 + 175 * t // (n - 1), dtype=np.uint8) for t in range(n)])


def previous_frame(view, threshold):
    """A rule that compares neighbours only."""
    x = view.pixels[0].float().flatten(1) / 127.5 - 1
    x = torch.cat([x, torch.ones(len(x), 16)], 1)
    alike = torch.cosine_similarity(x[1:], x[:-1], dim=-1)
    return [0, *(1 + (alike < threshold).nonzero()[:, 0]).tolist()]


@pytest.mark.system("kffocus", "exact")
def test_a_slow_fade_has_keyframes_because_the_last_one_is_what_counts():
    found = chosen(KFFocus(longest=0, context=0), view_of(fade()))
    assert len(found) > 1
    assert previous_frame(view_of(fade()), 0.9) == [0]


@pytest.mark.system("kffocus", "exact")
def test_a_keyframe_comes_after_so_many_frames_at_the_latest():
    still = view_of(scenes((), 10))
    assert chosen(KFFocus(longest=4, context=0), still) == [0, 4, 8]
    assert chosen(KFFocus(longest=4, context=1), still) == [0, 2, 4, 6, 8, 9]
    assert chosen(KFFocus(longest=1, tau=-1.5), still) == list(range(10))


@pytest.mark.system("kffocus", "exact")
@given(st.integers(1, 20), st.integers(0, 20), st.data())
def test_so_many_keyframes_as_are_asked_for(n, seed, data):
    """A still video as well, of which a rule with a threshold alone would show one frame."""
    cuts = data.draw(st.sets(st.integers(0, 19), max_size=4))
    count = data.draw(st.integers(1, n))
    found = chosen(KFFocus(keyframes=count, context=0), view_of(scenes(cuts, n, seed)))
    assert len(found) == count
    assert found[0] == 0


def sees_events(choose):
    """Of events of two frames in a video of 240, at least nine of ten are seen with 16 frames."""
    seen = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        start = int(random.integers(1, 238))
        frames = (120 + 4 * random.standard_normal((240, 16, 16, 3))).clip(0, 255).astype(np.uint8)
        frames[start : start + 2, 2:14, 2:14] = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        seen += bool({start, start + 1} & set(choose(view_of(frames))))
    assert seen >= 18, seen


@pytest.mark.system("kffocus", "directional")
def test_an_event_of_a_second_is_seen_more_often_than_at_equal_distances():
    sees_events(lambda view: chosen(KFFocus(keyframes=16, context=0), view))


@pytest.mark.parametrize("stub", [lambda view: evenly(view.n, 16).tolist(), lambda view: list(range(16))])
def test_the_events_tell_a_stub(stub):
    with pytest.raises(AssertionError):
        sees_events(stub)


def test_features_can_be_looked_at():
    features = torch.eye(3).repeat_interleave(4, 0)[None]
    still = scenes((), 12)
    assert chosen(KFFocus(look="features", context=0), view_of(still, features)) == [0, 4, 8]
    with pytest.raises(WinnowError, match="features="):
        chosen(KFFocus(look="features"), view_of(still))


def clip(cuts=(3, 7), t=9, b=1, seed=0):
    """Projected tokens of scenes."""
    starts = [max(s for s in (0, *cuts) if s <= i) for i in range(t)]
    x = tokens(seed, t * P, 16)[0].unflatten(0, (t, P))
    x = x[starts] + 0.1 * x
    return View.of(x.flatten(0, 1)[None].expand(b, -1, -1).contiguous(), layout=Layout.grid(H, W, t))


def of_frames(found, t):
    return found.representatives[0].div(P, rounding_mode="floor").bincount(minlength=t).tolist()


@pytest.mark.system("kffocus", "exact")
@pytest.mark.parametrize("keep", [1, 5, 9, 30, 54, 100, 215])
def test_the_budget_is_met_and_keyframes_have_most_of_it(keep):
    found = KFFocus(keep=keep).reduce(clip())
    assert found.m == keep
    counts = of_frames(found, 9)
    assert sum(counts) == keep
    assert min(counts[t] for t in (0, 3, 7)) >= max(counts[t] for t in range(9) if t not in (0, 3, 7))
    if 30 <= keep <= 54:  # 16 to one, and nothing full
        assert counts[0] >= 8 * counts[1]


@pytest.mark.system("kffocus", "exact")
def test_where_all_frames_are_keyframes_all_have_the_same():
    method = KFFocus(keep=36, tau=-1.5, longest=1)
    assert of_frames(method.reduce(clip()), 9) == [4] * 9
    assert ids(KFFocus(keep="100%").reduce(clip())) == list(range(9 * P))


@pytest.mark.system("kffocus", "exact")
def test_tokens_are_means_over_squares_of_the_frame():
    view = View.of(tokens(0, 36), layout=Layout.grid(6, 6))
    made = KFFocus(keep=4).reduce(view).apply(view.tokens)[0]
    grid = view.tokens[0].view(6, 6, -1)
    want = torch.stack([grid[r : r + 3, c : c + 3].mean((0, 1)) for r in (0, 3) for c in (0, 3)])
    assert torch.allclose(made, want, atol=1e-6)


def test_what_is_no_grid_is_condensed_in_runs():
    tiled = View.of(tokens(0, 48), layout=Picture.tiled(4, 2, 1).lm)
    found = KFFocus(keep=6).reduce(tiled)
    assert torch.allclose(found.apply(tiled.tokens)[0], tiled.tokens[0].unflatten(0, (6, 8)).mean(1), atol=1e-6)
    picture = View.of(tokens(0, 36), layout=Layout.grid(6, 6))
    part = replace(picture, tokens=picture.tokens[:, 4:], ids=picture.ids[:, 4:])
    found = KFFocus(keep=4).reduce(part)
    assert torch.allclose(found.apply(part.tokens)[0], part.tokens[0].unflatten(0, (4, 8)).mean(1), atol=1e-6)


def test_frames_of_which_tokens_are_gone_are_refused():
    view = clip()
    part = replace(view, tokens=view.tokens[:, 3:], ids=view.ids[:, 3:])
    with pytest.raises(WinnowError, match="kffocus needs a token at each of 24 places"):
        KFFocus().reduce(part)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_tokens_are_counted_and_reach_nothing(value):
    view = clip()
    view.tokens[0, [2, P + 7]] = value
    found = KFFocus(keep=30).reduce(view)
    assert found.apply(view.tokens).isfinite().all()
    assert int(view.notes["nan_scores"]) == 2


def test_half_precision_and_batches():
    view = clip(b=3)
    view.tokens[1] = clip((2,)).tokens[0]
    together = KFFocus(keep=30).reduce(view)
    for i in range(3):
        alone = KFFocus(keep=30).reduce(View.of(view.tokens[i : i + 1], layout=view.layout))
        assert torch.equal(together.lane(i).to_matrix(), alone.lane(0).to_matrix())
    half = replace(view, tokens=view.tokens.bfloat16())
    wide = replace(view, tokens=half.tokens.float())
    assert torch.equal(KFFocus(keep=30).reduce(half).to_matrix(), KFFocus(keep=30).reduce(wide).to_matrix())


def test_on_a_model_frames_are_chosen_and_their_tokens_condensed():
    model, processor = zoo.model("qwen2_5_vl"), VideoProcessor("what is this ?")
    frames = np.kron(scenes((4, 6), 8), np.ones((1, 3, 4, 1), dtype=np.uint8))[:, :42, :56]
    plan = KFFocus(keep=10, context=1, longest=0)
    with winnow.compress(model, plan, processor=processor) as handle:
        video = handle.frames(Video.of(frames, fps=2))
        assert video.sampled.numbers == (0, 2, 4, 5, 6, 7)
        with handle.using(handle.plan, videos=[video]):
            generate(model, model_inputs(model, processor, video, "what is this ?"))
        (item,) = handle.last.items
    assert [name for name, *_ in item.frames.reductions] == ["frames"]
    assert len(item.kept) == 10


def test_bad_settings_say_what_is_allowed():
    for name, value in (("tau", 3), ("ratio", 0.5), ("look", "codec"), ("longest", -1)):
        with pytest.raises(WinnowError, match=name):
            KFFocus(**{name: value})
