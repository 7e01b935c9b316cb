"""From a path, bytes or a file to an open descriptor, and what container it holds."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from winnow.core.sampled import Sampled
from winnow.media import MediaError, check_local
from winnow.video.clip import Video
from winnow.video.process import decoded
from winnow.video.sampling import DEFAULT_COUNT, Sampling, VideoLimits

_ALLOWED = "MP4, MOV, WebM, Matroska or GIF"
_LIMITS = VideoLimits()
HEAD = 64  # bytes that tell the container
_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis", b"crx ")
_FOREIGN = {
    b"OggS": "Ogg",
    b"FLV": "Flash video",
    b"#EXTM3U": "a playlist",
    b"\x30\x26\xb2\x75": "Windows Media",
    b"\0\0\1\xba": "an MPEG program stream",
    b"\0\0\1\xb3": "a raw MPEG stream",
    b"\0\0\0\1": "a raw H.264 or HEVC stream",
    b"ID3": "MP3",
}


def open_video(source: Any, *, sampling: Sampling | None = None, limits: VideoLimits = _LIMITS) -> Video:
    """The sampled frames of an untrusted video.

    Args:
        source: a local path (never one that came over a network), encoded bytes, or a binary file, which is read from
            its start where it can seek.
        sampling: default: `Sampling.count(8)`.

    Raises:
        MediaError: the video is not taken, with a `code`.
        UnsupportedError: PyAV is not installed, or the system holds no limits on processes.
    """
    rule = Sampling.count(DEFAULT_COUNT) if sampling is None else sampling
    if rule.rule == "count" and rule.value > limits.max_frames:
        raise MediaError(
            f"{rule.value:g} frames were asked for; at most {limits.max_frames} are allowed", "too_many_frames"
        )
    with opened(source, limits) as file:
        name = container_name(os.pread(file, HEAD, 0))
        found, frames, times, numbers, whole = decoded(file, DEMUXER[name], rule, limits)
    if not frames:
        raise MediaError("the video is damaged before the first frame that was to be taken", "truncated_video")
    sampled = Sampled(
        rule=str(rule),
        given=found["given"],
        picked=found["picked"],
        taken=len(frames),
        kept=len(frames),
        numbers=tuple(numbers),
        duration=found["duration"],
        fps=(found["given"] - 1) / found["span"] if found["span"] > 0 else None,
        container=name,
        codec=found["codec"],
        broken=found["broken"] or not whole,
    )
    return Video(np.stack(frames), tuple(times), sampled)


def container_of(source: Any) -> str | None:
    """`mp4`, `webm` or `gif`, by the first bytes of a local file; None for what is no video.

    Raises:
        MediaError: the file cannot be read, or is a video of another kind.
    """
    with opened(source, VideoLimits(max_bytes=2**61)) as file:
        head = os.pread(file, HEAD, 0)
    try:
        return None if _is_picture(head) else container_name(head)
    except MediaError as refused:
        if refused.code != "invalid_video":
            raise
    return None


DEMUXER = {"mp4": "mov", "webm": "matroska", "gif": "gif"}


def container_name(head: bytes) -> str:
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "webm"
    if head[4:8] == b"ftyp" and not _is_picture(head):
        return "mp4"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # QuickTime without a brand
        return "mp4"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        raise MediaError(f"AVI is not supported, because its frames carry no times: give {_ALLOWED}",
                         "unsupported_format")  # fmt: skip
    foreign = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None)
    if _is_picture(head):
        foreign = "a picture in HEIF or AVIF"
    if foreign:
        raise MediaError(f"{foreign} is not supported: give {_ALLOWED}", "unsupported_format")
    raise MediaError(f"this is not a video: give {_ALLOWED}", "invalid_video")


def _is_picture(head: bytes) -> bool:
    """Whether it is a picture in the container that MP4 has, too."""
    return head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS


@contextlib.contextmanager
def opened(source: Any, limits: VideoLimits) -> Iterator[int]:
    """A descriptor of a regular file that holds the video; what is not one is copied into a file without a name."""
    if isinstance(source, str):
        check_local(source)
    if isinstance(source, str | os.PathLike):
        file = _open(source, limits)
        try:
            yield file
        finally:
            os.close(file)
        return
    with tempfile.TemporaryFile() as copy:
        _fill(copy, source, limits)
        copy.flush()
        yield copy.fileno()


def _open(path: str | os.PathLike[str], limits: VideoLimits) -> int:
    file = -1
    with contextlib.suppress(OSError, ValueError, TypeError):
        if stat.S_ISREG(os.stat(path).st_mode):  # opening a device can have effects
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if file < 0:
        raise MediaError("the given path is not a readable, regular file", "unreadable_file")
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode):  # it was changed meanwhile
        os.close(file)
        raise MediaError("the given path is not a readable, regular file", "unreadable_file")
    if about.st_size > limits.max_bytes:
        os.close(file)
        raise _too_long(limits)
    return file


def _fill(copy: Any, source: Any, limits: VideoLimits) -> None:
    if isinstance(source, bytes | bytearray | memoryview):
        buffer = memoryview(source)
        if buffer.nbytes > limits.max_bytes:
            raise _too_long(limits)
        copy.write(buffer)
        return
    if not hasattr(source, "read"):
        raise MediaError(f"got {type(source).__name__}: give a path, bytes or a binary file; frames that you have "
                         "already are a Video.of(frames, fps=…)", "bad_type")  # fmt: skip
    wrong, left = False, limits.max_bytes
    try:
        with contextlib.suppress(AttributeError, OSError):  # a pipe is read from where it is
            source.seek(0)
        while left >= 0 and (part := source.read(min(2**20, left + 1))):
            copy.write(part)
            left -= len(part)
    except Exception:  # a file object of the caller's fails in its own ways
        wrong = True
    if wrong:
        raise MediaError("the file object cannot be read as bytes", "unreadable_file")
    if left < 0:
        raise _too_long(limits)


def _too_long(limits: VideoLimits) -> MediaError:
    return MediaError(f"the video has more than the {limits.max_bytes} bytes that are allowed", "too_large")
