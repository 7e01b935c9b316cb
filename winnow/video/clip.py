"""Video: sampled frames with their times, and how they were sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from winnow.core.errors import WinnowError
from winnow.core.sampled import Sampled

_CLOCK = 1000  # ticks of a second, in which a processor is told the times


@dataclass(frozen=True, eq=False)
class Video:
    """Frames and when they are shown.

    Attributes:
        frames: `[T, H, W, 3]`.
        times: seconds from the first frame of the file, ascending.
        sampled: how they were chosen.
    """

    frames: UInt8[np.ndarray, "t h w 3"]
    times: tuple[float, ...]
    sampled: Sampled

    @staticmethod
    def of(frames: Any, *, fps: float | None = None, times: Sequence[float] | None = None) -> Video:
        """A video from frames that are there already, with their rate or their times.

        Args:
            frames: `[T, H, W, 3]` uint8, as an array, or a sequence of such frames.

        Raises:
            WinnowError: no frames, another shape or dtype, or times that do not ascend.
        """
        array = np.asarray(frames)
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape:
            raise WinnowError(
                f"Video.of takes frames of shape (T, height, width, 3), uint8, with at least one; "
                f"got {array.shape}, {array.dtype}."
            )
        if (fps is None) == (times is None):
            raise WinnowError("Video.of takes fps= or times=, one of them: frames alone do not say when they are.")
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise WinnowError(f"fps={fps!r}; give frames per second above 0.")
        n = len(array)
        shown = [i / fps for i in range(n)] if fps is not None else [float(t) for t in times or ()]
        ascend = all(a < b for a, b in pairwise(shown))
        if len(shown) != n or not ascend or not all(map(math.isfinite, shown)) or shown[0] < 0:
            raise WinnowError(
                f"times= has {len(shown)} numbers for {n} frames; give ascending seconds from 0, for each one."
            )
        spacing = (shown[-1] - shown[0]) / (n - 1) if n > 1 else (1 / fps if fps else 0.0)
        rate = fps if fps is not None else (1 / spacing if spacing else None)
        about = Sampled("given", n, n, n, n, tuple(range(n)), shown[-1] - shown[0] + spacing, rate)
        return Video(array, tuple(shown), about)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def spacing(self) -> float:
        """Mean seconds between frames. Of one frame: how long it is shown, or 1 where the file does not say."""
        if len(self.times) > 1:
            return (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        return self.sampled.duration or 1.0

    @property
    def metadata(self) -> dict[str, Any]:
        """What a processor of transformers takes as `video_metadata`, beside `do_sample_frames=False`.

        It counts in milliseconds and not in frames of the file, whose rate may vary: `frames_indices / fps` are the
        true times, and the rate that is derived from `total_num_frames` is that of the sampled frames.
        """
        length, (high, wide) = len(self.times), self.frames.shape[1:3]
        return {
            "total_num_frames": max(1, round(length * self.spacing * _CLOCK)),
            "fps": float(_CLOCK),
            "frames_indices": [round(time * _CLOCK) for time in self.times],
            "duration": float(self.sampled.duration or length * self.spacing),
            "width": wide,
            "height": high,
        }

    def take(self, chosen: Sequence[int]) -> Video:
        """Some of the frames, by ascending index."""
        chosen = list(chosen)
        if not chosen or sorted(set(chosen)) != chosen or chosen[0] < 0 or chosen[-1] >= len(self):
            raise WinnowError(f"take({chosen}): give at least one ascending index below {len(self)}.")
        about = replace(self.sampled, kept=len(chosen), numbers=tuple(self.sampled.numbers[i] for i in chosen))
        return Video(self.frames[chosen], tuple(self.times[i] for i in chosen), about)

    def small(self, side: int = 64) -> UInt8[np.ndarray, "t h w 3"]:
        """The frames with at most `side` pixels on their longer side, each pixel the mean of what it covers."""
        high, wide = self.frames.shape[1:3]
        scale = min(1.0, side / max(high, wide))
        size = max(1, round(wide * scale)), max(1, round(high * scale))
        return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in self.frames])
