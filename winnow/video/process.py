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
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from winnow.core.errors import UnsupportedError
from winnow.media import MediaError
from winnow.video.refusals import broken, refusal
from winnow.video.sampling import Sampling, VideoLimits

DECODER = Path(__file__).with_name("decoder.py")
MISSING = "Videos need PyAV, which is not installed: pip install 'tokenwinnow[video]'."
_FRAME = struct.Struct("<IIBhQd")  # as in decoder.py
_LONGEST_MESSAGE = 4096  # bytes of a JSON message
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # where the system finds libraries


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        pixels: `[H, W, 3]`, upright.
        time: seconds from the first frame of the file.
        number: which frame of the file it is, from 0.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    time: float
    number: int


Message = dict[str, Any] | Frame | bool
"""What the scan found; a frame; at the end, whether all that were wanted could be decoded."""


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
    with _child(_request(file, demuxer, sampling, limits)) as child:
        reader = _Reader(child.stdout.fileno(), limits)  # type: ignore[union-attr]
        found, *frames, whole = _messages(reader, limits, limits.max_frames, limits.max_decoded)
    times, numbers = [frame.time for frame in frames], [frame.number for frame in frames]  # type: ignore[union-attr]
    return found, [frame.pixels for frame in frames], times, numbers, whole  # type: ignore[return-value, union-attr]


def streamed(file: int, demuxer: str, sampling: Sampling, limits: VideoLimits) -> Generator[Message, None, None]:
    """The same one by one, for frames that nobody wants to hold together. The process ends with the generator.

    `limits.timeout` holds for each frame, and not for whoever takes them; those of the number of frames and of their
    bytes together do not hold.
    """
    with _child(_request(file, demuxer, sampling, limits, each=True)) as child:
        reader = _Reader(child.stdout.fileno(), limits)  # type: ignore[union-attr]
        for message in _messages(reader, limits, limits.max_listed, None):
            yield message
            reader.renew()


def _request(file: int, demuxer: str, sampling: Sampling, limits: VideoLimits, each: bool = False) -> dict[str, Any]:
    """What the process is asked for.

    Args:
        each: whether frames are read one by one.
    """
    if os.name != "posix":
        raise UnsupportedError("Videos are decoded in a process with limits, which this system does not have.")
    if find_spec("av") is None:
        raise UnsupportedError(MISSING)
    return {
        "file": file,
        "demuxer": demuxer,
        "rule": sampling.rule,
        "value": sampling.value,
        "each": each,
        "frames": limits.max_listed if each else limits.max_frames,
        "listed": limits.max_listed,
        "streams": limits.max_streams,
        "pixels": limits.max_pixels,
        "side": limits.max_side,
        "duration": limits.max_seconds,
        "memory": limits.max_memory,
        "seconds": limits.timeout,
        "path": [entry for entry in sys.path if entry],
    }


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
        self.renew()

    def renew(self) -> None:
        """Start the time anew."""
        self.until = time.monotonic() + self.limits.timeout

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
            raise broken()
        try:
            made = json.loads(self.bytes(length))
        except ValueError:
            made = None
        if not isinstance(made, dict):
            raise broken()
        return made


def _messages(reader: _Reader, limits: VideoLimits, most: int, room: int | None) -> Iterator[Message]:
    """What the process says, believed as far as it can be checked.

    Args:
        most: frames.
        room: bytes of all frames together, counted before they are copied; None: any number.
    """
    found: dict[str, Any] = {}
    count, last, taken = 0, -1, 0
    while True:
        kind = reader.bytes(1)
        if kind == b"X":
            raise refusal(reader.facts(), limits)
        if kind == b"S" and not found:
            found = _checked(reader.facts())
            yield found
        elif kind == b"E" and found:
            yield reader.facts().get("whole") is True
            return
        elif kind == b"F" and found:
            width, height, channels, rotation, number, seconds = _FRAME.unpack(reader.bytes(_FRAME.size))
            taken += width * height * channels
            if room is not None and taken > room:
                raise MediaError(
                    f"the frames need more than the {room} bytes that are allowed; take fewer frames", "too_large"
                )
            fits = 0 < width * height <= limits.max_pixels and max(width, height) <= limits.max_side
            ordered = last < number < found["given"] and math.isfinite(seconds)
            if not (fits and count < min(found["chosen"], most) and ordered and channels in (3, 4)):
                raise broken()
            pixels = np.empty((height, width, channels), np.uint8)
            reader.into(pixels)
            count, last = count + 1, number
            yield Frame(_upright(_on_white(pixels), rotation), seconds, number)
        else:
            raise broken()


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """The scan's facts, if each is a number or a word of the kind that it is to be."""
    whole = ("given", "keys", "picked", "chosen")
    real = ("duration", "span")
    right = all(isinstance(found.get(name), int) and 0 <= found[name] < 2**40 for name in whole)
    right &= all(isinstance(found.get(name), int | float) and 0 <= found[name] < math.inf for name in real)
    right &= isinstance(found.get("codec"), str) and isinstance(found.get("broken"), bool)
    if not right or found["chosen"] < 1:
        raise broken()
    return found


def _on_white(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape[2] == 3:
        return pixels
    colour, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _upright(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """Turned by the quarter turns, to the left, that the file asks for."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation / 90) % 4))
