"""A video frame by frame: each is decoded when it is wanted, and let go by whoever has taken it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from winnow.media import MediaError
from winnow.video.process import Frame, Message, streamed
from winnow.video.sampling import Sampling, VideoLimits
from winnow.video.source import DEMUXER, HEAD, container_name, opened

DEFAULT_RATE = 2.0  # frames of a second
_LIMITS = VideoLimits()


@dataclass(eq=False)
class Reading:
    """The frames of a video, in order; can be gone through once.

    Attributes:
        rule: of the sampling.
        given: frames of the file.
        picked: frames that the rule names.
        duration: seconds of the file.
        container, codec: of the file.
        broken: whether frames at the end are missing; known behind the last frame.
        taken: frames that were given so far.
    """

    rule: str
    given: int
    picked: int
    duration: float
    container: str
    codec: str
    broken: bool
    _messages: Iterator[Message] = field(repr=False)
    taken: int = 0

    def __iter__(self) -> Iterator[Frame]:
        for message in self._messages:
            if isinstance(message, Frame):
                self.taken += 1
                yield message
            else:
                self.broken = self.broken or message is not True
        if not self.taken:
            raise MediaError("the video is damaged before the first frame that was to be taken", "truncated_video")

    def facts(self) -> dict[str, Any]:
        """What is known of the video, for JSON."""
        names = ("rule", "given", "picked", "taken", "duration", "container", "codec", "broken")
        return {name: getattr(self, name) for name in names}


@contextlib.contextmanager
def read_video(source: Any, *, sampling: Sampling | None = None, limits: VideoLimits = _LIMITS) -> Iterator[Reading]:
    """The frames of an untrusted video one by one, however long it is: `for frame in reading`.

    Of `limits`, `timeout` holds for each frame by itself, and `max_frames` and `max_decoded` do not hold, because one
    frame is held at a time. The file is the one that was opened: what is appended to it later is not read.

    Args:
        source: as `open_video` takes it.
        sampling: default: 2 frames a second.

    Raises:
        MediaError, UnsupportedError: as `open_video`; also later, where the decoder dies behind some frames.
    """
    rule = Sampling.rate(DEFAULT_RATE) if sampling is None else sampling
    with opened(source, limits) as file:
        name = container_name(os.pread(file, HEAD, 0))
        with contextlib.closing(streamed(file, DEMUXER[name], rule, limits)) as messages:
            found: Any = next(messages)
            own = {key: found[key] for key in ("given", "picked", "duration", "codec", "broken")}
            yield Reading(rule=str(rule), container=name, _messages=messages, **own)
