"""Clips by name and as files: `clip:SEED`, and an MP4 that says which clip it holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from winnow.core.errors import WinnowError
from winnow.video.overlay import save_film
from winnow.world.clips.clip import VERSION, clip
from winnow.world.clips.names import FPS
from winnow.world.clips.records import Clip

NAME = "clip:"
STAMP = "winnow-clip "  # in the comment of the file; JSON follows
LONGEST = 2**22  # bytes that are searched for it
ZOOM = 4  # pixels of the file for one of the clip: players show it larger, and little is lost in coding
CLOSE = 8.0  # levels of 255 by which coding may change a pixel, in the mean


def named_clip(name: str, split: str = "test") -> Clip:
    """The clip of `clip:SEED`, of 16 frames, or of `clip:SEED:FRAMES`."""
    numbers = name.removeprefix(NAME).split(":")
    if not (name.startswith(NAME) and len(numbers) in (1, 2) and all(n.isascii() and n.isdecimal() for n in numbers)):
        raise WinnowError(
            f"A drawn clip is clip:SEED or clip:SEED:FRAMES with whole numbers, for example clip:7 or clip:7:32; got "
            f"{name!r}."
        )
    return clip(int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 16, split=split)


def save_clip(drawn: Clip, path: Path) -> None:
    """Write a clip as an MP4 or a GIF, four times as large. An MP4 says which clip it is.

    Raises:
        UnsupportedError: there is no PyAV, which encodes an MP4.
        WinnowError: the name ends otherwise.
    """
    about = {"version": VERSION, "seed": drawn.seed, "frames": drawn.frames, "side": drawn.side, "split": drawn.split}
    size = (ZOOM * drawn.side, ZOOM * drawn.side)
    large = [image.resize(size, Image.Resampling.NEAREST) for image in drawn.images]
    save_film(large, path, seconds=1 / FPS, note=STAMP + json.dumps(about))


def clip_in(source: str | Path, frames: Sequence[np.ndarray] | np.ndarray) -> Clip | None:
    """The clip that a file says it holds, if its first frames are nearly those that are drawn again.

    Args:
        frames: of the file, from the first one on, two a second.
    """
    said = _origin(source)
    if said is None or said.get("version") != VERSION:
        return None
    with contextlib.suppress(WinnowError, TypeError, ValueError, KeyError):  # the stamp is not ours
        drawn = clip(int(said["seed"]), int(said["frames"]), int(said["side"]), str(said["split"]))
        size = (drawn.side, drawn.side)
        small = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames]
        if 0 < len(small) <= drawn.frames:
            apart = np.abs(np.stack(small).astype(np.float32) - drawn.pixels[: len(small)])
            return drawn if float(apart.mean()) <= CLOSE else None
    return None


def _origin(source: str | Path) -> dict[str, Any] | None:
    """What a file says of itself. The stamp is a label, not a proof."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with Path(source).open("rb") as file:
            head = file.read(LONGEST)
        at = head.find(STAMP.encode())
        text = head[at + len(STAMP) : at + len(STAMP) + 300].decode("ascii", errors="replace")
        found = json.JSONDecoder().raw_decode(text)[0] if at >= 0 else None
        return found if isinstance(found, dict) else None
    return None
