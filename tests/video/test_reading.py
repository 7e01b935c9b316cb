"""A video frame by frame: the frames that `open_video` gives, however many, in the time of whoever reads them."""

from __future__ import annotations

import subprocess
import time

import numpy as np
import pytest
from video_assets import clip, frames

from winnow.media import MediaError
from winnow.video import Sampling, VideoLimits, open_video, process, read_video

from .test_hostile import stand_in


@pytest.fixture
def children(monkeypatch):
    """The processes that are started."""
    found, start = [], subprocess.Popen
    monkeypatch.setattr(process.subprocess, "Popen", lambda *a, **k: found.append(start(*a, **k)) or found[-1])
    return found


@pytest.mark.parametrize("rule", [Sampling.rate(2), Sampling.rate(30), Sampling.count(7), Sampling.keyframes()])
def test_frames_are_those_of_the_whole_video(rule):
    data = clip(frames(40), gop=6)
    whole = open_video(data, sampling=rule)
    with read_video(data, sampling=rule) as reading:
        found = list(reading)
    assert np.array_equal(np.stack([frame.pixels for frame in found]), whole.frames)
    assert tuple(frame.time for frame in found) == whole.times
    assert tuple(frame.number for frame in found) == whole.sampled.numbers
    facts = reading.facts()
    assert {name: facts[name] for name in facts if name != "taken"} == {
        name: whole.sampled.facts()[name] for name in facts if name != "taken"
    }
    assert reading.taken == len(found)


def test_more_frames_than_are_ever_held():
    data, limits = clip(frames(400), fps=50), VideoLimits(max_frames=8, max_decoded=64 * 48 * 3 * 4)
    with read_video(data, sampling=Sampling.rate(1000), limits=limits) as reading:
        shown = [(frame.number, frame.pixels.mean()) for frame in reading]
    assert [number for number, _ in shown] == list(range(400))
    assert shown[0][1] < shown[200][1] < shown[399][1]


def test_the_time_is_that_of_each_frame_and_not_of_its_reader():
    """The process waits longer than it may decode, with a frame that no pipe holds."""
    data = clip(frames(6, (640, 480)))
    with read_video(data, sampling=Sampling.rate(1000), limits=VideoLimits(timeout=1.0)) as reading:
        found = []
        for frame in reading:
            time.sleep(3.6 if frame.number == 1 else 0)  # the process would have ended itself after 3 seconds
            found.append(frame.number)
    assert found == list(range(6))


@pytest.mark.parametrize(
    ("code", "expected", "before"),
    [
        ("scanned(); frame(1, 1); os.write(1, bytes(3)); time.sleep(600)", "too_slow", 1),
        ("scanned(); frame(1, 1); os.write(1, bytes(3)); os.abort()", "invalid_video", 1),
        ("scanned(); frame(1, 1); os.write(1, bytes(3)); frame(1, 1)", "invalid_video", 1),
        ("scanned(); say(b'E', {'whole': False})", "truncated_video", 0),
        ("time.sleep(600)", "too_slow", 0),
    ],
)
def test_a_decoder_that_hangs_dies_or_lies_later(code, expected, before, monkeypatch, tmp_path, children):
    stand_in(monkeypatch, tmp_path, code)
    taken, began = [], time.monotonic()
    with pytest.raises(MediaError) as caught, read_video(clip(frames(2)), limits=VideoLimits(timeout=1.5)) as reading:
        taken += [frame.number for frame in reading]
    assert caught.value.code == expected
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert time.monotonic() - began < 8
    assert [child.returncode is None for child in children] == [False]


def test_a_reader_that_stops_ends_the_process(children):
    with read_video(clip(frames(40, (640, 480))), sampling=Sampling.rate(1000)) as reading:
        next(iter(reading))
        assert children[0].poll() is None
    assert children[0].returncode is not None


def test_a_damaged_video_is_read_up_to_the_damage():
    noise = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
    whole = clip(noise, gop=4, faststart=True)
    with read_video(whole[: len(whole) // 2], sampling=Sampling.rate(8)) as reading:
        found = list(reading)
    assert reading.broken
    assert 2 < len(found) < 22


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"0123456789", "invalid_video"), (b"RIFF\0\0\0\0AVI LIST", "unsupported_format"), (7, "bad_type")],
)
def test_what_is_no_video_is_refused(data, code):
    with pytest.raises(MediaError) as caught, read_video(data):
        pytest.fail("it was opened")
    assert caught.value.code == code
