"""Which frames of a video are decoded, and what a video may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from winnow.core.errors import WinnowError

DEFAULT_COUNT = 8


@dataclass(frozen=True)
class Sampling:
    """The rule by which frames are picked, from the times in the file, before any is decoded.

    - `Sampling.count(8)`: the middle frames of 8 equal runs of frames; all frames where there are no more than 8.
    - `Sampling.rate(2)`: the frames on screen at 0, 0.5, 1, … seconds, each of them once.
    - `Sampling.keyframes()`: the frames that the encoder stored whole.

    What a rate or the keyframes give beyond `VideoLimits.max_frames` is thinned to it evenly, and said.
    """

    rule: str
    value: float = 0.0

    def __post_init__(self) -> None:
        value = self.value
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if self.rule == "count":
            if not number or value != int(value) or value < 1:
                raise WinnowError(f"Sampling.count({value!r}): give a whole number of frames from 1.")
        elif self.rule == "rate":
            if not number or not 0 < value <= 1000:
                raise WinnowError(f"Sampling.rate({value!r}): give frames per second, above 0 and at most 1000.")
        elif self.rule != "keyframes":
            raise WinnowError(f"Sampling rule {self.rule!r}; allowed: count, rate, keyframes.")

    @staticmethod
    def count(frames: int) -> Sampling:
        return Sampling("count", frames)

    @staticmethod
    def rate(fps: float) -> Sampling:
        return Sampling("rate", fps)

    @staticmethod
    def keyframes() -> Sampling:
        return Sampling("keyframes")

    def __str__(self) -> str:
        shown = {"count": f"{self.value:g} evenly", "rate": f"{self.value:g} per second", "keyframes": "keyframes"}
        return shown[self.rule]


@dataclass(frozen=True)
class VideoLimits:
    """What a video may be, and what decoding it may take. The defaults suit a server."""

    max_bytes: int = 256 * 2**20  # of the file
    max_streams: int = 16  # pictures, sound and subtitles together
    max_seconds: float = 12 * 3600.0  # of the video
    max_listed: int = 2_000_000  # frames that the file may hold
    max_pixels: int = 4096 * 2304  # width × height of a frame
    max_side: int = 8192  # pixels
    max_frames: int = 256  # frames that are decoded and kept
    max_decoded: int = 768 * 2**20  # bytes of the kept frames together, as RGB
    max_memory: int = 2 * 2**30  # bytes of address space of the process that decodes
    timeout: float = 60.0  # seconds for all of it

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            real = field.name in ("max_seconds", "timeout")
            kind = int | float if real else int
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**62:
                number = "number above 0" if real else "whole number from 1"
                raise WinnowError(f"VideoLimits({field.name}={value!r}): give a {number}.")
