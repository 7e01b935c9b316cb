"""Hostile videos: each is an error of ours, in time, within its limits, and leaves nothing behind. V2 of the list."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from video_assets import boxes, clip, frames, many_tracks, packets, remuxed, sound_alone, which

from winnow.core.errors import UnsupportedError
from winnow.media import MediaError
from winnow.video import Sampling, VideoLimits, open_video, process


def refused(source: object, code: str, limits: VideoLimits | None = None, **more) -> MediaError:
    """The refusal, which is ours alone; afterwards no descriptor is left open."""
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    with pytest.raises(MediaError) as caught:
        open_video(source, limits=limits or VideoLimits(timeout=30.0), **more)
    assert caught.value.code == code, caught.value
    assert caught.value.__cause__ is caught.value.__context__ is None
    if before is not None:
        assert set(os.listdir("/proc/self/fd")) == before
    return caught.value


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Every process that was started has ended and was waited for; no temporary file stays."""
    folder, children = tmp_path / "temporary", []
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    start = subprocess.Popen
    monkeypatch.setattr(process.subprocess, "Popen", lambda *a, **k: children.append(start(*a, **k)) or children[-1])
    yield
    assert [child for child in children if child.returncode is None] == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "invalid_video"),
        (b"0123456789", "invalid_video"),
        (b"<html><body>404</body></html>", "invalid_video"),
        (b"\0\0\0\x20ftypisom" + bytes(200), "invalid_video"),
        (b"\x1aE\xdf\xa3" + bytes(200), "invalid_video"),
        (b"GIF89a" + bytes(200), "invalid_video"),
        (b"RIFF\0\0\0\0AVI LIST", "unsupported_format"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n", "unsupported_format"),
        (b"\0\0\0\x20ftypheic" + bytes(200), "unsupported_format"),
    ],
)
def test_V2_what_is_no_video(data, code, tmp_path):
    path = tmp_path / "named.mp4"
    path.write_bytes(data)
    assert refused(path, code).status in (400, 415)
    refused(data, code)


def test_V2_no_pictures_and_no_known_codec():
    refused(sound_alone(), "no_video")
    refused(clip(frames(3), codec="ffv1", container="matroska"), "unsupported_format")
    assert len(open_video(clip(frames(3), sound=True))) == 3


def test_V2_a_file_cut_off_gives_what_is_before_the_cut_or_is_refused():
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 64, 3), dtype=np.uint8)
    at_the_end, in_front = clip(noise, gop=4), clip(noise, gop=4, faststart=True)
    refused(at_the_end[: len(at_the_end) // 2], "invalid_video")  # the index is gone
    whole = open_video(in_front, sampling=Sampling.count(40))
    part = open_video(in_front[: len(in_front) // 2], sampling=Sampling.count(40))
    assert part.sampled.broken
    assert not whole.sampled.broken
    assert 5 < len(part) < 35
    assert np.array_equal(part.frames, whole.frames[: len(part)])
    assert "damaged" in str(part.sampled)
    webm = clip(noise, gop=4, container="matroska")
    assert 5 < len(open_video(webm[: len(webm) // 2], sampling=Sampling.count(40))) < 35


def test_V2_damage_in_the_middle_ends_the_video_there():
    data = bytearray(clip(frames(40), gop=4))
    good = packets(bytes(data))
    at = bytes(data).find(good[20][8:])
    data[at : at + len(good[20]) - 8] = bytes(len(good[20]) - 8)
    video = open_video(bytes(data), sampling=Sampling.count(40))
    assert video.sampled.broken
    assert which(video.frames, 40) == list(range(len(video)))
    assert len(video) <= 20


def test_V2_8k_is_refused_by_its_header():
    data = clip(np.zeros((1, 4320, 7680, 3), np.uint8), codec="mjpeg", container="mov")
    said = str(refused(data, "too_large"))
    assert "7680 × 4320" in said


def test_V2_a_header_that_lies_about_the_size_does_not_help():
    data = bytearray(clip(frames(2, (640, 480)), codec="mjpeg", container="mov"))
    at = boxes(bytes(data), b"jpeg")[0] + 24  # width and height of the sample entry
    assert struct.unpack_from(">HH", data, at) == (640, 480)
    struct.pack_into(">HH", data, at, 16, 16)
    limits = VideoLimits(max_pixels=320 * 240, timeout=30.0)
    with pytest.raises(MediaError) as caught:
        open_video(bytes(data), limits=limits)
    assert caught.value.code in ("too_large", "truncated_video", "invalid_video")


def test_V2_a_gif_of_65535_pixels_a_side():
    data = bytearray(clip(frames(2), codec="gif", container="gif"))
    struct.pack_into("<HH", data, 6, 65535, 65535)
    refused(bytes(data), "too_large")


def test_V2_thousands_of_streams():
    began = time.monotonic()
    assert "16 streams" in str(refused(many_tracks(17), "too_large"))
    assert "16 streams" in str(refused(many_tracks(5000), "too_large"))
    assert time.monotonic() - began < 25


def test_V2_frames_that_change_their_size():
    source, other = (clip(frames(2, size), codec="libvpx", container="webm", gop=1) for size in ((64, 48), (32, 32)))
    mixed = [*packets(source), *packets(other)]
    refused(remuxed(source, [(40 * i, data) for i, data in enumerate(mixed)]), "unsupported_format")


def test_V2_a_video_without_length_is_one_frame():
    source = clip(frames(1), codec="mjpeg", container="mov")
    video = open_video(remuxed(source, [(0, packets(source)[0])] * 3), sampling=Sampling.rate(5))
    assert len(video) == 1
    assert video.times == (0.0,)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_bytes": 1000}, "1000 bytes"),
        ({"max_seconds": 1.0}, "4.8"),
        ({"max_listed": 10}, "10 frames"),
        ({"max_side": 32}, "32 on a side"),
        ({"max_decoded": 64 * 48 * 3 * 5}, "take fewer frames"),
        ({"max_streams": 1}, "1 streams"),
    ],
)
def test_each_limit_is_held_and_named(limits, says):
    data = clip(frames(40), sound="max_streams" in limits)
    assert says in str(refused(data, "too_large", VideoLimits(**limits)))


def test_a_path_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "fifo.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    for name in ("fifo.mp4", "link.mp4", "loop.mp4", "none.mp4", "."):
        refused(tmp_path / name, "unreadable_file")
    refused("/dev/zero", "unreadable_file")
    refused("a\0b", "unreadable_file")
    for url in ("http://localhost/a.mp4", "file:///etc/passwd", "//host/share/a.mp4", "concat:a|b"):
        refused(url, "bad_url")
    refused(7, "bad_type")
    (tmp_path / "good.mp4").write_bytes(clip(frames(2)))
    (tmp_path / "fine.mp4").symlink_to(tmp_path / "good.mp4")
    assert len(open_video(tmp_path / "fine.mp4")) == 2


PREAMBLE = """
import json, os, struct, sys, time
asked = json.loads(sys.stdin.readline())
def say(kind, facts):
    text = json.dumps(facts).encode()
    os.write(1, kind + struct.pack("<I", len(text)) + text)
def scanned():
    say(b"S", dict(given=9, keys=1, duration=1.0, span=1.0, picked=2, chosen=2, codec="h264", broken=False))
def frame(wide, high, number=0, seconds=0.0):
    os.write(1, b"F" + struct.pack("<IIBhQd", wide, high, 3, 0, number, seconds))
"""


def stand_in(monkeypatch, tmp_path, code: str) -> None:
    """Another program in the place of the decoder: what a decoder could do that was taken over, or went wrong."""
    path = tmp_path / "decoder.py"
    path.write_text(PREAMBLE + code)
    monkeypatch.setattr(process, "DECODER", path)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("time.sleep(600)", "too_slow"),
        ("os.close(1); time.sleep(600)", "invalid_video"),
        ("os.abort()", "invalid_video"),
        ("while True: os.write(1, b'S' + bytes([255] * 4))", "invalid_video"),
        ("frame(1, 1)", "invalid_video"),
        ("say(b'S', {})", "invalid_video"),
        ("say(b'S', [])", "invalid_video"),
        ("say(b'S', 'x' * 5000)", "invalid_video"),
        ("say(b'X', {'code': '/secret'})", "invalid_video"),
        ("say(b'X', {'code': ['/secret']})", "invalid_video"),
        ("say(b'X', {'code': 'pixels', 'width': '/secret'})", "too_large"),
        ("scanned(); frame(2**31, 2**31)", "too_large"),
        ("scanned(); frame(0, 9)", "invalid_video"),
        ("scanned(); frame(1, 1, number=99)", "invalid_video"),
        ("scanned(); frame(1, 1, seconds=float('nan'))", "invalid_video"),
        ("scanned(); [(frame(1, 1, number=i), os.write(1, bytes(3))) for i in range(9)]", "invalid_video"),
        ("scanned(); frame(1, 1); time.sleep(600)", "too_slow"),
        ("scanned(); say(b'E', {'whole': False})", "truncated_video"),
    ],
)
def test_a_decoder_that_hangs_dies_or_lies(code, expected, monkeypatch, tmp_path):
    stand_in(monkeypatch, tmp_path, code)
    data = clip(frames(2))
    began = time.monotonic()
    said = str(refused(data, expected, VideoLimits(timeout=2.0)))
    assert time.monotonic() - began < 8
    assert "/secret" not in said


def test_the_decoder_sees_no_environment_and_no_name(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKEN_OF_MINE", "secret")
    seen = tmp_path / "seen"
    stand_in(monkeypatch, tmp_path, f"open({str(seen)!r}, 'w').write(repr((dict(os.environ), asked)))")
    path = tmp_path / "private-name.mp4"
    path.write_bytes(clip(frames(2)))
    refused(path, "invalid_video")
    told = seen.read_text()
    assert "secret" not in told
    assert "private-name" not in told


def test_memory_is_the_limit_of_the_child_and_not_of_this_process():
    before = resource.getrlimit(resource.RLIMIT_AS)
    refused(clip(frames(2)), "too_large", VideoLimits(max_memory=48 * 2**20, timeout=30.0))
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(open_video(clip(frames(2)))) == 2


def test_a_frame_that_needs_more_memory_than_is_allowed():
    """As many pixels as a frame may have, where the process may hold half of what they take."""
    data = clip(np.zeros((3, 2304, 4096, 3), np.uint8), codec="mjpeg", container="mov")
    assert open_video(data, sampling=Sampling.count(1)).frames.shape == (1, 2304, 4096, 3)
    said = str(refused(data, "too_large", VideoLimits(max_memory=150 * 2**20, timeout=30.0)))
    assert "memory" in said or "bytes that are allowed" in said


LIMITED = """
import sys, time
from winnow.video import decoder
decoder.limit({"seconds": 0.5, "memory": 2**29})
"""


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("while True: pass", {-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL}),
        ("time.sleep(600)", {-signal.SIGALRM}),
        ("bytearray(2**30)", {1}),
        ("file = open(sys.argv[1], 'w'); file.write('x'); file.flush()", {1}),
        ("pass", {0}),
    ],
)
def test_the_system_holds_the_child_to_its_limits_also_without_its_parent(code, ends, tmp_path):
    path = tmp_path / "written"
    done = subprocess.run([sys.executable, "-c", LIMITED + code, path], check=False, capture_output=True, timeout=60)
    assert done.returncode in ends
    assert not path.exists() or path.stat().st_size == 0


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(process, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"tokenwinnow\[video\]"):
        open_video(clip(frames(2)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("container", ["mp4", "webm", "gif"])
def test_files_with_bytes_changed_are_opened_or_refused(container, seed):
    codec = {"mp4": "libx264", "webm": "libvpx", "gif": "gif"}[container]
    data = bytearray(clip(frames(12), codec=codec, container=container, faststart=container == "mp4"))
    random = np.random.default_rng(seed)
    reach = 200 if seed % 2 else len(data)  # every second time, headers alone
    for at in random.integers(4, reach, 1 + seed):
        data[at] = random.integers(256)
    with contextlib.suppress(MediaError):  # whatever else it raises, and a child that stays, is a failure
        assert 1 <= len(open_video(bytes(data), limits=VideoLimits(timeout=20.0))) <= 12
