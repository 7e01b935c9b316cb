"""The parent's side of the process that decodes: started for one video, watched by a clock, and ended with it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from winnow.core.errors import UnsupportedError
from winnow.media import MediaError
from winnow.video.sampling import Sampling, VideoLimits

DECODER = Path(__file__).with_name("decoder.py")
MISSING = "Videos need PyAV, which is not installed: pip install 'tokenwinnow[video]'."
_FRAME = struct.Struct("<IIBhQd")  # as in decoder.py
_LONGEST_MESSAGE = 4096  # bytes of a JSON message
_CODECS = "H.264, HEVC, MPEG-4, VP8, VP9, AV1, Motion JPEG or GIF"
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # where the system finds libraries


def decoded(
    file: int, demuxer: str, sampling: Sampling, limits: VideoLimits
) -> tuple[dict[str, Any], list[np.ndarray], list[float], list[int], bool]:
    """What the scan found; the kept frames `[H, W, 3]` with their seconds and numbers; whether all could be decoded.

    Args:
        file: descriptor of the open video.

    Raises:
        MediaError: the video is refused, or its decoder died, hung or needed too much.
        UnsupportedError: PyAV is not there, or the system holds no limits.
    """
    if os.name != "posix":
        raise UnsupportedError("Videos are decoded in a process with limits, which this system does not have.")
    if find_spec("av") is None:
        raise UnsupportedError(MISSING)
    asked = {
        "file": file,
        "demuxer": demuxer,
        "rule": sampling.rule,
        "value": sampling.value,
        "frames": limits.max_frames,
        "listed": limits.max_listed,
        "streams": limits.max_streams,
        "pixels": limits.max_pixels,
        "side": limits.max_side,
        "duration": limits.max_seconds,
        "memory": limits.max_memory,
        "seconds": limits.timeout,
        "path": [entry for entry in sys.path if entry],
    }
    with _child(asked) as child:
        return _frames(_Reader(child.stdout.fileno(), limits), limits)  # type: ignore[union-attr]


@contextlib.contextmanager
def _child(asked: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, and its end: whatever happened, it is killed and waited for."""
    child = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", str(DECODER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=(asked["file"],),
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        bufsize=0,
    )
    try:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asked).encode() + b"\n")  # type: ignore[union-attr]
        yield child
    finally:
        child.kill()
        child.stdin.close()  # type: ignore[union-attr]
        child.stdout.close()  # type: ignore[union-attr]
        child.wait()


class _Reader:
    """Exact numbers of bytes from a pipe, until the time is up."""

    def __init__(self, pipe: int, limits: VideoLimits) -> None:
        self.pipe, self.limits = pipe, limits
        self.until = time.monotonic() + limits.timeout

    def into(self, buffer: Any) -> None:
        left = memoryview(buffer).cast("B")
        while left:
            rest = self.until - time.monotonic()
            if rest <= 0 or not select.select([self.pipe], [], [], rest)[0]:
                raise MediaError(f"decoding the video took more than {self.limits.timeout:g} seconds", "too_slow")
            got = os.readv(self.pipe, [left])
            if not got:
                raise MediaError(
                    "the decoder ended before it was done: the video is damaged, or it needs more than the "
                    f"{self.limits.max_memory} bytes of memory or {self.limits.timeout:g} seconds that are allowed",
                    "invalid_video",
                )
            left = left[got:]

    def bytes(self, count: int) -> bytes:
        buffer = bytearray(count)
        self.into(buffer)
        return bytes(buffer)

    def facts(self) -> dict[str, Any]:
        (length,) = struct.unpack("<I", self.bytes(4))
        if length > _LONGEST_MESSAGE:
            raise _broken()
        try:
            made = json.loads(self.bytes(length))
        except ValueError:
            made = None
        if not isinstance(made, dict):
            raise _broken()
        return made


def _broken() -> MediaError:
    return MediaError("the decoder answered with nonsense: the video is damaged", "invalid_video")


def _frames(
    reader: _Reader, limits: VideoLimits
) -> tuple[dict[str, Any], list[np.ndarray], list[float], list[int], bool]:
    found: dict[str, Any] = {}
    frames: list[np.ndarray] = []
    times: list[float] = []
    numbers: list[int] = []
    taken = 0
    while True:
        kind = reader.bytes(1)
        if kind == b"X":
            raise _refusal(reader.facts(), limits)
        if kind == b"S" and not found:
            found = _checked(reader.facts())
        elif kind == b"E" and found:
            return found, frames, times, numbers, reader.facts().get("whole") is True
        elif kind == b"F" and found:
            width, height, channels, rotation, number, seconds = _FRAME.unpack(reader.bytes(_FRAME.size))
            taken += width * height * channels
            if taken > limits.max_decoded:
                raise MediaError(
                    f"the frames need more than the {limits.max_decoded} bytes that are allowed; take fewer frames",
                    "too_large",
                )
            fits = 0 < width * height <= limits.max_pixels and max(width, height) <= limits.max_side
            fresh = len(frames) < min(found["chosen"], limits.max_frames)
            ordered = number < found["given"] and (not numbers or number > numbers[-1]) and math.isfinite(seconds)
            if not (fits and fresh and ordered and channels in (3, 4)):
                raise _broken()
            pixels = np.empty((height, width, channels), np.uint8)
            reader.into(pixels)
            frames.append(_upright(_on_white(pixels), rotation))
            times.append(seconds)
            numbers.append(number)
        else:
            raise _broken()


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """The scan's facts, if each is a number or a word of the kind that it is to be."""
    whole = ("given", "keys", "picked", "chosen")
    real = ("duration", "span")
    right = all(isinstance(found.get(name), int) and 0 <= found[name] < 2**40 for name in whole)
    right &= all(isinstance(found.get(name), int | float) and 0 <= found[name] < math.inf for name in real)
    right &= isinstance(found.get("codec"), str) and isinstance(found.get("broken"), bool)
    if not right or found["chosen"] < 1:
        raise _broken()
    return found


def _on_white(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape[2] == 3:
        return pixels
    colour, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _upright(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """Turned by the quarter turns, to the left, that the file asks for."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation / 90) % 4))


def _refusal(facts: dict[str, Any], limits: VideoLimits) -> MediaError:
    def number(name: str) -> str:
        value = facts.get(name)
        return f"{value:g}" if isinstance(value, int | float) else "?"

    said = {
        "invalid": ("the video cannot be read: it is damaged or cut off, or its content is not what it begins as",
                    "invalid_video"),
        "no_video": ("the file holds no pictures, only sound or data", "no_video"),
        "codec": (f"its video codec is not supported: give {_CODECS}", "unsupported_format"),
        "streams": (f"the file has more than the {limits.max_streams} streams that are allowed", "too_large"),
        "pixels": (
            f"its frames have {number('width')} × {number('height')} pixels; at most {limits.max_pixels} in all and "
            f"{limits.max_side} on a side are allowed",
            "too_large",
        ),
        "unsized": ("the size of its frames cannot be read, or is too large", "too_large"),
        "frames": (f"the file lists more than the {limits.max_listed} frames that are allowed", "too_large"),
        "duration": (
            f"the video lasts {number('seconds')} seconds; at most {limits.max_seconds:g} are allowed", "too_large"
        ),
        "times": ("its frames carry no times, so they cannot be sampled; write it anew as MP4 or WebM",
                  "unsupported_format"),
        "empty": ("the video has no frame that can be read", "no_frames"),
        "keyframes": ("the video marks no keyframes; sample it by count or by rate", "no_frames"),
        "sizes": ("its frames change their size within the video, which is not supported", "unsupported_format"),
        "memory": (f"decoding needs more than the {limits.max_memory} bytes that are allowed", "too_large"),
        "import": ("PyAV cannot be loaded within the memory that is allowed", "too_large"),
    }  # fmt: skip
    code = facts.get("code")
    return MediaError(*said[code]) if isinstance(code, str) and code in said else _broken()
