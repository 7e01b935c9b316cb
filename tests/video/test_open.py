"""Videos opened: what is sampled, when it is shown, and what it looks like. V1 to V5 of the list of bad inputs."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from video_assets import TICKS, clip, frames, packets, remuxed, turned, which

from winnow.core.errors import WinnowError
from winnow.media import MediaError
from winnow.video import Sampling, Video, VideoLimits, container_of, open_video
from winnow.video.decoder import choose

KINDS = {
    "mp4": {"codec": "libx264", "container": "mp4"},
    "mov": {"codec": "mjpeg", "container": "mov"},
    "mpeg4": {"codec": "mpeg4", "container": "mp4"},
    "webm": {"codec": "libvpx-vp9", "container": "webm"},
    "mkv": {"codec": "libx264", "container": "matroska"},
    "hevc": {"codec": "libx265", "container": "mp4"},
    "av1": {"codec": "libsvtav1", "container": "mp4", "ticks": 200},
    "gif": {"codec": "gif", "container": "gif"},
}
CONTAINERS = {"mov": "mp4", "mpeg4": "mp4", "mkv": "webm", "hevc": "mp4", "av1": "mp4"}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_and_times_of_every_container(kind, tmp_path):
    path = tmp_path / "named.txt"  # a name says nothing
    path.write_bytes(clip(frames(24), **KINDS[kind]))
    video = open_video(path, sampling=Sampling.count(6))
    assert video.frames.shape == (6, 48, 64, 3)
    assert video.frames.dtype == np.uint8
    assert which(video.frames, 24) == list(video.sampled.numbers) == [2, 6, 10, 14, 18, 22]
    assert video.times == pytest.approx([n / 8 for n in video.sampled.numbers], abs=0.011)
    assert (video.sampled.given, video.sampled.kept, video.sampled.broken) == (24, 6, False)
    assert video.sampled.fps == pytest.approx(8, rel=0.02)
    assert container_of(path) == video.sampled.container == CONTAINERS.get(kind, kind)


@pytest.mark.parametrize("how", ["path", "text", "bytes", "file", "pipe"])
def test_sources(how, tmp_path):
    data = clip(frames(5))
    path = tmp_path / "clip"
    path.write_bytes(data)

    class Pipe:
        read = io.BytesIO(data).read

    source = {"path": path, "text": str(path), "bytes": data, "file": io.BytesIO(data), "pipe": Pipe()}[how]
    assert which(open_video(source).frames, 5) == [0, 1, 2, 3, 4]


def test_a_rate_takes_what_is_on_screen_and_nothing_twice():
    data = clip(frames(12), times=[0, 0.1, 0.2, 0.9, 1.0, 1.05, 1.1, 2.0, 2.5, 2.6, 2.7, 4.0])
    video = open_video(data, sampling=Sampling.rate(2))
    assert which(video.frames, 12) == [0, 2, 4, 6, 7, 8, 10, 11]
    assert video.times == (0, 0.2, 1.0, 1.1, 2.0, 2.5, 2.7, 4.0)
    assert str(video.sampled) == "8 of 12 frames (2 per second)"


def test_keyframes_are_those_that_the_encoder_stored_whole():
    video = open_video(clip(frames(30), gop=10), sampling=Sampling.keyframes())
    assert which(video.frames, 30) == list(video.sampled.numbers) == [0, 10, 20]


def test_frames_far_apart_are_sought_and_equal_those_decoded_in_order():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    data = clip(pixels, gop=8)
    whole = open_video(data, sampling=Sampling.count(40))
    for rule in (Sampling.count(3), Sampling.keyframes(), Sampling.rate(1)):
        some = open_video(data, sampling=rule)
        assert np.array_equal(some.frames, whole.frames[list(some.sampled.numbers)])


@pytest.mark.parametrize("quarter", [1, 2, 3])
def test_a_turned_video_is_upright(quarter):
    pixels = frames(3)
    pixels[:, :24] = 0  # the upper half is black
    data = clip(pixels)
    plain, made = open_video(data), open_video(turned(data, quarter))
    assert np.array_equal(made.frames, np.rot90(plain.frames, -quarter, axes=(1, 2)))


def test_what_is_transparent_in_a_gif_is_white():
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    red.paste((0, 0, 0, 0), (0, 0, 4, 8))
    made = io.BytesIO()
    red.save(made, "GIF", save_all=True, append_images=[red.rotate(90)], duration=100, disposal=2)
    first = open_video(made.getvalue()).frames[0]
    assert (first[:, :4] == 255).all()
    assert (first[:, 4:] == (255, 0, 0)).all()


def test_V1_no_frames_one_two_and_odd_numbers():
    for n in (1, 2, 3, 5):
        video = open_video(clip(frames(n)))
        assert which(video.frames, n) == list(range(n))
        assert len(video.metadata["frames_indices"]) == n
        assert video.spacing > 0
    with pytest.raises(MediaError) as caught:
        open_video(clip(frames(2), container="matroska")[:400])
    assert caught.value.status == 400
    with pytest.raises(WinnowError, match="at least one"):
        Video.of(np.zeros((0, 4, 4, 3), np.uint8), fps=1)


def test_V3_ten_hours_of_100000_frames_are_sampled_before_decoding():
    """All frames but those that are chosen are garbage: whoever decoded another one would fail."""
    n, hours = 100_000, 10
    source = clip(frames(8), codec="mjpeg", container="mov")
    good = packets(source)
    wanted = [(2 * i + 1) * n // 16 for i in range(8)]
    content = dict(zip(wanted, good, strict=True))
    step = hours * 3600 * TICKS // n
    data = remuxed(source, ((i * step, content.get(i, b"garbage")) for i in range(n)))
    video = open_video(data, sampling=Sampling.count(8))
    assert which(video.frames, 8) == list(range(8))
    assert list(video.sampled.numbers) == wanted
    assert (video.sampled.given, video.sampled.broken) == (n, False)
    assert video.times == tuple(i * step / TICKS for i in wanted)


def test_V3_a_rate_beyond_the_limit_is_thinned_and_said():
    data = clip(frames(60), fps=240, ticks=24_000)
    video = open_video(data, sampling=Sampling.rate(240), limits=VideoLimits(max_frames=10))
    assert (video.sampled.picked, video.sampled.taken) == (60, 10)
    assert "thinned from 60" in str(video.sampled)
    assert which(video.frames, 60) == [3, 9, 15, 21, 27, 33, 39, 45, 51, 57]


def test_V3_variable_and_missing_rates_are_the_true_times():
    times = [0.0, 0.05, 0.4, 0.41, 3.0]
    for container in ("mp4", "matroska"):
        video = open_video(clip(frames(5), times=times, container=container))
        assert video.times == pytest.approx(times, abs=0.001)
        assert video.sampled.fps == pytest.approx(4 / 3, rel=0.001)
    assert open_video(clip(frames(1))).sampled.fps is None


def test_V4_a_still_video_is_sampled_as_any_other():
    video = open_video(clip(np.full((20, 48, 64, 3), 90, np.uint8)), sampling=Sampling.count(5))
    assert len(video) == 5
    assert np.ptp(video.frames) <= 2


def test_V5_a_cut_at_every_frame_keeps_the_budget():
    pixels = np.random.default_rng(1).integers(0, 2, (24, 1, 1, 3), dtype=np.uint8) * 255
    data = clip(np.broadcast_to(pixels, (24, 48, 64, 3)).copy(), gop=1)
    assert len(open_video(data, sampling=Sampling.keyframes())) == 24
    assert len(open_video(data, sampling=Sampling.keyframes(), limits=VideoLimits(max_frames=7))) == 7


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("count", [1, 3, 8, 100])
def test_a_count_is_spread_evenly(n, count):
    picked, named = choose([i / 8 for i in range(n)], [0], "count", count, 1000)
    assert len(picked) == named == min(n, count)
    gaps = {b - a for a, b in pairwise(picked)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert picked[0] - 0 in ((n - 1 - picked[-1]), (n - 1 - picked[-1]) + 1, (n - 1 - picked[-1]) - 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sampling.count(0), "from 1"),
        (lambda: Sampling.count(2.5), "whole number"),  # type: ignore[arg-type]
        (lambda: Sampling.rate(0), "above 0"),
        (lambda: Sampling.rate(float("nan")), "above 0"),
        (lambda: Sampling("scenes"), "allowed: count"),
        (lambda: VideoLimits(max_frames=0), "whole number"),
        (lambda: VideoLimits(timeout=-1.0), "above 0"),
        (lambda: open_video(b"", sampling=Sampling.count(257)), "at most 256"),
    ],
)
def test_settings_out_of_range_are_refused(make, says):
    with pytest.raises(WinnowError, match=says):
        make()


@pytest.mark.parametrize(
    ("made", "more", "says"),
    [
        (np.zeros((2, 4, 4, 1), np.uint8), {"fps": 1}, "height, width, 3"),
        (np.zeros((2, 4, 4, 3)), {"fps": 1}, "uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), {}, "fps= or times="),
        (np.zeros((2, 4, 4, 3), np.uint8), {"fps": 1, "times": [0, 1]}, "one of them"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"fps": 0.0}, "above 0"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"times": [1, 0]}, "ascending"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"times": [0]}, "for 2 frames"),
    ],
)
def test_frames_that_are_given_are_checked(made, more, says):
    with pytest.raises(WinnowError, match=says):
        Video.of(made, **more)


def test_metadata_tells_a_processor_the_true_times_and_the_rate_of_the_sample():
    video = Video.of(frames(4), times=[0.0, 0.5, 1.0, 1.5]).take([0, 2])
    told = video.metadata
    assert [index / told["fps"] for index in told["frames_indices"]] == [0.0, 1.0]
    assert len(told["frames_indices"]) / told["total_num_frames"] * told["fps"] == 1.0  # sampled_fps of transformers


def test_neither_winnow_nor_its_door_loads_pyav_or_torch():
    code = "import sys, winnow, winnow.video; print([n for n in ('av', 'torch') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
