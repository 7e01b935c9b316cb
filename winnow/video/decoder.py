"""The child process that decodes a video: run as a script, with a request on its standard input.

It stands alone (the standard library and PyAV), so that it starts fast and holds little that a broken decoder could
reach. It sets its own limits before PyAV is loaded, reads the one file that it was handed open, and writes messages:

- `S` + length + JSON: what the scan found, once, before any frame;
- `F` + width, height, channels, rotation (degrees to the left), number, time + pixels: a frame, rows from the top;
- `E` + length + JSON: the end; `X` + length + JSON: the video is refused.

Of a request with `each` frames are read one by one, and its limits of time are those of each frame. Numbers are
little-endian. The parent believes none of it (`winnow.video.process`).
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import json
import math
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

FRAME = struct.Struct("<IIBhQd")
CODECS = ("h264", "hevc", "mpeg4", "vp8", "libvpx", "vp9", "libvpx-vp9", "libdav1d", "av1", "mjpeg", "gif")
CANONICAL = ("h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "mjpeg", "gif")


class Refused(Exception):
    """What is wrong with the video: a word that the parent knows, and numbers for its message."""

    def __init__(self, code: str, **facts: Any) -> None:
        super().__init__(code)
        self.code, self.facts = code, facts


def choose(times: Sequence[float], keys: Sequence[int], rule: str, value: float, most: int) -> tuple[list[int], int]:
    """The numbers of the frames that a rule picks, in order, and how many it picked before they were thinned to `most`.

    - `count`: the middle frames of `value` equal runs of frames; all of them if there are no more.
    - `rate`: the frames that are on screen at 0, 1/value, 2/value, … seconds, each of them once.
    - `keyframes`: those that start a group of pictures.

    Args:
        times: seconds of all frames, ascending, the first at 0.
        keys: numbers of the keyframes.
    """
    n = len(times)
    if rule == "count":
        picked = _middles(n, min(n, int(value)))
    elif rule == "rate":
        picked = _on_screen(times, value)
    else:
        picked = list(keys)
    if len(picked) <= most:
        return picked, len(picked)
    return [picked[at] for at in _middles(len(picked), most)], len(picked)


def _on_screen(times: Sequence[float], rate: float) -> list[int]:
    """The frames during which a tick falls, of those at 0, 1/rate, … up to the last frame."""
    last, found = math.floor(times[-1] * rate + 1e-6), []
    for number, (time, end) in enumerate(zip(times, (*times[1:], math.inf), strict=True)):
        tick = max(0, math.ceil((time - 1e-6) * rate))
        if tick <= last and tick / rate + 1e-6 < end:
            found.append(number)
    return found


def _middles(n: int, parts: int) -> list[int]:
    return [(2 * i + 1) * n // (2 * parts) for i in range(parts)]


def limit(asked: dict[str, Any]) -> None:
    """Bounds that the system holds: address space, processor time, wall time, no file written, no core left."""
    seconds = math.ceil(asked["seconds"])
    resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], asked["memory"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if asked.get("each"):
        renew(seconds)
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + 1, seconds + 1))
    signal.alarm(seconds + 2)  # its parent ends it sooner, unless the parent has died


def renew(seconds: int) -> None:
    """Start the clocks anew, behind a frame that somebody has taken in his own time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    until = math.ceil(used.ru_utime + used.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (until if most == resource.RLIM_INFINITY else min(until, most), most))
    signal.alarm(seconds + 2)


class Source:
    """The video in its file, opened anew for each pass."""

    def __init__(self, av: Any, asked: dict[str, Any]) -> None:
        self.av, self.asked = av, asked
        self.file = os.fdopen(asked["file"], "rb", buffering=0)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[tuple[Any, Any]]:
        """The open container and its video stream; nothing but the container's own demuxer and known decoders run."""
        asked = self.asked
        self.file.seek(0)
        options = {
            "protocol_whitelist": "none",
            "format_whitelist": asked["demuxer"],
            "codec_whitelist": ",".join(CODECS),
            "max_streams": str(max(1000, asked["streams"])),
            "threads": "1",
        }
        try:
            container = self.av.open(self.file, "r", format=asked["demuxer"], options=options, metadata_errors="ignore")
        except MemoryError:
            raise
        except (self.av.FFmpegError, ValueError, OverflowError, UnicodeError):
            container = None
        if container is None:
            raise Refused("invalid")
        with container:
            yield container, self._stream(container)

    def _stream(self, container: Any) -> Any:
        if len(container.streams) > self.asked["streams"]:
            raise Refused("streams")
        cover = self.av.stream.Disposition.attached_pic
        found = [s for s in container.streams if s.type == "video" and not s.disposition & cover]
        if not found:
            raise Refused("no_video")
        stream = found[0]
        for other in container.streams:
            if other is not stream:
                other.discard = self.av.stream.Discard.all
        context = stream.codec_context
        if context is None or context.codec.name not in CODECS:
            raise Refused("codec")
        width, height = context.width, context.height
        if not width * height:
            raise Refused("unsized")
        if width * height > self.asked["pixels"] or max(width, height) > self.asked["side"]:
            raise Refused("pixels", width=width, height=height)
        context.thread_count = 1
        context.options = {"max_pixels": str(self.asked["pixels"]), "err_detect": "explode"}
        return stream


def scan(source: Source) -> dict[str, Any]:
    """The times of all frames and which are keyframes, without decoding any of them."""
    frames: dict[int, bool] = {}
    last, broken, packets = 0, False, 0
    with source() as (container, stream):
        base, declared = stream.time_base, stream.frames
        codec = stream.codec_context.codec.canonical_name
        try:
            for packet in container.demux(stream):
                packets += 1
                if packets > source.asked["listed"]:
                    raise Refused("frames")
                if packet.is_corrupt:
                    broken = True
                    break
                if not packet.size or packet.is_discard:
                    continue
                if packet.pts is None:
                    raise Refused("times")
                frames[packet.pts] = frames.get(packet.pts, False) or packet.is_keyframe
                last = max(last, packet.pts + (packet.duration or 0))
        except MemoryError:
            raise
        except (source.av.FFmpegError, ValueError, OverflowError):
            broken = True
    if not frames:
        raise Refused("empty")
    stamps = sorted(frames)
    if (last - stamps[0]) * base > source.asked["duration"]:
        raise Refused("duration", seconds=float((stamps[-1] - stamps[0]) * base))
    return {
        "codec": codec if codec in CANONICAL else "",
        "stamps": stamps,
        "times": [float((stamp - stamps[0]) * base) for stamp in stamps],
        "keys": [number for number, stamp in enumerate(stamps) if frames[stamp]],
        "duration": float((max(last, stamps[-1]) - stamps[0]) * base),
        "broken": broken or packets - 1 < declared,
    }


def decode(source: Source, found: dict[str, Any], wanted: list[int], give: Callable[[int, Any], None]) -> bool:
    """Give the wanted frames in order; False where the video is damaged, and frames from there on are missing.

    Each group of frames behind one keyframe is sought and decoded by itself. A container that cannot be sought right
    is decoded from its start, and so is a video that is read frame by frame.
    """
    stamps, keys = found["stamps"], found["keys"]
    if source.asked["each"]:
        with source() as (container, stream):
            return _pass(source, container, stream, stamps, wanted, give, None)[0]
    groups: dict[int, list[int]] = {}
    for number in wanted:
        at = bisect.bisect_right(keys, number) - 1
        groups.setdefault(keys[at] if at >= 0 else 0, []).append(number)
    left = list(wanted)
    for key, own in groups.items():
        with source() as (container, stream):
            if key:
                try:
                    container.seek(stamps[key], stream=stream)
                except (source.av.FFmpegError, ValueError, OverflowError):
                    break
            done, landed = _pass(source, container, stream, stamps, own, give, None if key == 0 else stamps[key])
            if not landed:
                break
            left = [number for number in left if number > own[-1]] if done else left
            if not done:
                return False
    if not left:
        return True
    with source() as (container, stream):
        return _pass(source, container, stream, stamps, left, give, None)[0]


def _pass(
    source: Source,
    container: Any,
    stream: Any,
    stamps: list[int],
    wanted: list[int],
    give: Callable[[int, Any], None],
    sought: int | None,
) -> tuple[bool, bool]:
    """Decode on until the wanted frames are there: whether all are, and whether seeking landed before them."""
    left = {stamps[number]: number for number in wanted}
    end = stamps[wanted[-1]]
    first = True
    try:
        for packet in container.demux(stream):
            if first and sought is not None and (packet.pts is None or packet.pts > sought):
                return False, False
            first = False
            for frame in packet.decode():
                if frame.pts in left:
                    if frame.is_corrupt:
                        return False, True
                    give(left.pop(frame.pts), frame)
                if frame.pts is not None and frame.pts >= end:
                    return not left, True
    except MemoryError:
        raise
    except source.av.FFmpegError:
        return False, True
    return not left, True


class Writer:
    """Messages to the parent."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.out, self.asked = os.dup(1), asked
        os.dup2(2, 1)  # nothing else is to write there
        self.size: tuple[int, int] | None = None

    def message(self, kind: bytes, **facts: Any) -> None:
        text = json.dumps(facts).encode()
        self._write(kind + struct.pack("<I", len(text)) + text)

    def frame(self, number: int, time: float, frame: Any) -> None:
        width, height = frame.width, frame.height
        if not width * height:
            raise Refused("unsized")
        if width * height > self.asked["pixels"]:
            raise Refused("pixels", width=width, height=height)
        if self.size not in (None, (width, height)):
            raise Refused("sizes")
        self.size = width, height
        alpha = any(part.is_alpha for part in frame.format.components) or frame.format.name == "pal8"
        plain = frame.reformat(format="rgba" if alpha else "rgb24")
        channels = 4 if alpha else 3
        rotation = int(frame.rotation or 0)
        if self.asked["each"]:
            signal.alarm(0)  # whoever reads takes his time
        self._write(b"F" + FRAME.pack(width, height, channels, rotation, number, time))
        plane, row = plain.planes[0], width * channels
        pixels = memoryview(plane)
        if plane.line_size == row:
            self._write(pixels[: row * height])
        else:
            for at in range(height):
                start = at * plane.line_size
                self._write(pixels[start : start + row])
        if self.asked["each"]:
            renew(math.ceil(self.asked["seconds"]))

    def _write(self, data: Any) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self.out, left) :]


def serve(asked: dict[str, Any], writer: Writer) -> None:
    """Scan, choose and decode as was asked."""
    av = importlib.import_module("av")

    av.logging.set_level(None)
    source = Source(av, asked)
    found = scan(source)
    times = found["times"]
    wanted, picked = choose(times, found["keys"], asked["rule"], asked["value"], asked["frames"])
    if not wanted:
        raise Refused("keyframes")
    writer.message(
        b"S",
        given=len(times),
        keys=len(found["keys"]),
        duration=found["duration"],
        span=times[-1],
        picked=picked,
        chosen=len(wanted),
        codec=found["codec"],
        broken=found["broken"],
    )
    whole = decode(source, found, wanted, lambda number, frame: writer.frame(number, times[number], frame))
    writer.message(b"E", whole=whole)


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    limit(asked)
    writer = Writer(asked)
    sys.path[:] = asked["path"]
    try:
        serve(asked, writer)
    except Refused as refused:
        writer.message(b"X", code=refused.code, **refused.facts)
    except MemoryError:
        writer.message(b"X", code="memory")
    except ImportError:
        writer.message(b"X", code="import")


if __name__ == "__main__":
    main()
