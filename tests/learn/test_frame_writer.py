"""Deep Forcing on winnow's writer of frames: what becomes of streams ten times as long as those of its training."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.learn.resuming import check_resumes
from tests.methods.directional import gap
from winnow.cli import app
from winnow.core.info import ModelInfo
from winnow.learn.generation.clips import TEST, Clip, clip, distance, drift, look, motion, spoiled
from winnow.learn.generation.deep_forcing import DEEP, GIVEN, LATE, POLICIES, TRAINED, WRITTEN, load, train, unseen
from winnow.learn.generation.writer import GRID, IN_TIME, ROTARY, TOKENS, FrameCache, FrameWriter, pixels, tokens
from winnow.parts.learned import SHIPPED

SMALL = 0.012
COUNT = 16  # long streams
SHORT = 48  # short ones


def test_clips_are_their_seed_and_what_is_measured_of_them_knows_no_place():
    one, again, other = clip(3, 17), clip(3, 17), clip(4, 17)
    assert torch.equal(one.frames, again.frames)
    assert not torch.equal(one.frames, other.frames)
    still = unseen(4)
    assert still.known[:, 2:].all()
    torch.testing.assert_close(look(still.frames), look(still.frames)[:, :1].expand(-1, TRAINED, -1))
    assert drift(still.frames, 8).abs().max() < 1e-6
    assert distance(still.frames, still).abs().max() < 1e-9
    assert (motion(still.frames, 8) > 0.05).all()
    worse = spoiled(still.frames, still.ground, torch.Generator().manual_seed(0))
    assert torch.equal(worse[:, :3], still.frames[:, :3])
    assert (drift(worse, 8) > 0.01).all()
    cut = [clip(n, 40) for n in range(20)]
    assert 0.6 < float(Clip.stack(cut).known.float().mean()) < 0.95


@torch.no_grad()
def test_frames_one_by_one_are_the_frames_of_the_whole_clip():
    made, frames = FrameWriter().eval(), unseen(2).frames
    assert torch.equal(pixels(tokens(frames)), frames)
    caches = [FrameCache() for _ in made.blocks]
    whole = made(frames)
    for number in range(TRAINED):
        before = frames[:, number - 1] if number else None
        step = made(frames[:, number : number + 1], number, caches, before)
        torch.testing.assert_close(step[:, 0], whole[:, number], atol=1e-5, rtol=1e-5)
    later = made(frames, 100)
    torch.testing.assert_close(later, whole, atol=1e-4, rtol=1e-4)  # times count by their differences alone


@torch.no_grad()
def test_keys_have_the_phase_that_the_cache_turns():
    made, seen = FrameWriter().eval(), []
    caches = [FrameCache() for _ in made.blocks]
    made.blocks[0].qkv.weight.zero_()
    made.blocks[0].qkv.bias.fill_(1.0)
    for number in (0, 5):
        made(unseen(1).frames[:, :1], number, caches)
        seen.append(caches[0].held[0][:, :, -TOKENS:])
    shift = torch.full((1, 1, TOKENS), 5)
    torch.testing.assert_close(IN_TIME.turn(seen[0], shift), seen[1], atol=1e-5, rtol=1e-5)
    corner = ROTARY.turn(torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, dtype=torch.int64))
    torch.testing.assert_close(seen[0][:, :1, :1], corner)
    assert not torch.allclose(seen[0][:, :, GRID + 1], seen[0][:, :, 0])


def test_a_run_is_its_seed_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    for name, size in {"WRITTEN": 8, "LATE": 5, "MEASURED": 1}.items():
        monkeypatch.setattr(f"winnow.learn.generation.deep_forcing.{name}", size)
    whole = check_resumes(train, tmp_path, stop=6, scale=SMALL, save=4)
    assert load(whole).write(unseen(1).frames[:, :2], 5).shape == (1, 5, 8, 8, 3)


def test_it_has_a_command():
    assert "frames" in CliRunner().invoke(app, ["train", "--help"]).output


@functools.cache
def streams(name):
    """Long streams of clips that nobody was trained on, under a policy."""
    return load().write(unseen(COUNT).frames[:, :GIVEN], WRITTEN, POLICIES[name])


def drifts(name):
    return drift(streams(name), LATE).double().numpy()


WORSE = ("deep_sink_in_place", "no_sink")


def _drifts_less(ours):
    for other in WORSE:
        assert gap(drifts(other), ours).low > 0, other


@pytest.mark.system("deep-forcing", "directional")
@pytest.mark.xdist_group("streams")
def test_moved_deep_sinks_drift_less_than_sinks_in_place_and_than_none():
    _drifts_less(drifts("deep_sink"))
    assert motion(streams("deep_sink"), LATE).mean() > 0.3 * motion(unseen(COUNT).frames, 0).mean()


@pytest.mark.xdist_group("streams")
@pytest.mark.parametrize("stub", WORSE)
def test_that_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _drifts_less(drifts(stub))


@functools.cache
def kept_shares():
    """Of the tokens kept between sinks and newest frames, the share whose frame shows the shape, by choice.

    The shape is away in half of these frames, and back in the newest.
    """
    clips = Clip.stack([clip(TEST + 500 + n, 15, cuts=0) for n in range(SHORT)])
    first, last = 3, 11
    order = torch.rand(SHORT, last - first, generator=torch.Generator().manual_seed(0)).argsort(1)
    away = torch.zeros(SHORT, 15)
    away[:, first:last] = (order < (last - first) // 2).float()
    ground = clips.ground[:, None, None, None].expand_as(clips.frames)
    frames = torch.lerp(clips.frames, ground, away[..., None, None, None])
    found = {}
    for by in ("product", "attention", "newest"):
        method = DEEP.replace(sink=first, top=3, window=14, by=by)
        model = load()
        steps = method.steps(ModelInfo(depth=len(model.blocks)))
        caches = [FrameCache(tuple(s for s in steps if s.at.index == k)) for k in range(len(model.blocks))]
        with torch.no_grad():
            for number in range(15):
                model(frames[:, number : number + 1], number, caches, frames[:, number - 1] if number else None)
        shown = []
        for cache in caches:
            own = cache.held[2][..., first * TOKENS : (first + 3) * TOKENS] // TOKENS
            shown.append(1 - away[:, None].expand(-1, own.shape[1], -1).gather(2, own))
        found[by] = torch.stack(shown, 1).mean((1, 2, 3)).double().numpy()
    found["random"] = np.full(SHORT, 0.5)
    return found


@pytest.mark.system("deep-forcing", "directional")
@pytest.mark.xdist_group("streams")
@pytest.mark.parametrize("by", ["product", "attention"])
def test_frames_that_show_the_shape_again_are_kept(by):
    _shows(kept_shares()[by])


def _shows(ours):
    assert gap(ours, kept_shares()["random"]).low > 0


@pytest.mark.xdist_group("streams")
@pytest.mark.parametrize("stub", ["random", "newest"])
def test_that_fails_for_what_does_not_look(stub):
    with pytest.raises(AssertionError):
        _shows(kept_shares()[stub])


def test_what_is_shipped_says_how_it_was_made():
    facts = json.loads((SHIPPED / "frames.json").read_text(encoding="utf-8"))
    assert facts["command"] == "winnow train frames"
    assert (SHIPPED / "frames.safetensors").stat().st_size < 1_000_000
    trained, untrained = facts["measured"]["trained"], facts["measured"]["untrained"]
    assert trained["error"] < 0.2 * untrained["error"]
    assert np.isfinite(list(trained.values())).all()
