"""What is watched: a file, read frame by frame, or a clip that is drawn."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from winnow.video import Frame, Reading, Sampling, VideoLimits, read_video
from winnow.watch.clip_files import NAME, clip_in, named_clip
from winnow.world.clips import FPS, Clip

LIMITS = VideoLimits(max_bytes=64 * 2**30)  # a recording is long, and one frame of it is held at a time


@dataclass(eq=False)
class Source:
    """Frames in order, which can be gone through once.

    Attributes:
        drawn: the clip of winnow's world that they are, if they are one.
        reading: of a file.
    """

    name: str
    frames: Iterator[Frame]
    drawn: Clip | None = None
    reading: Reading | None = None

    @property
    def broken(self) -> bool:
        """Whether frames at the end are missing, as far as is known."""
        return self.reading is not None and self.reading.broken

    def facts(self) -> dict[str, Any]:
        """What is known of the video, for JSON."""
        return {"rule": "drawn"} if self.reading is None else self.reading.facts()


@contextlib.contextmanager
def opened(name: str, rate: float | None) -> Iterator[Source]:
    """A local file, or the clip of `clip:SEED` or `clip:SEED:FRAMES`.

    Args:
        rate: frames of a second that are read of a file; None: 2.

    Raises:
        MediaError: the file is no video, or is refused as `winnow.open_video` refuses it.
    """
    if name.startswith(NAME):
        drawn = named_clip(name)
        yield Source(name, (Frame(own, i / FPS, i) for i, own in enumerate(drawn.pixels)), drawn)
        return
    with read_video(name, sampling=None if rate is None else Sampling.rate(rate), limits=LIMITS) as reading:
        frames = iter(reading)
        first = next(frames)
        yield Source(name, itertools.chain([first], frames), clip_in(name, [first.pixels]), reading)
