"""Overlays of a video: a contact sheet of its frames with dropped tokens dimmed, and a short video of the same."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import Layout
from winnow.overlay import KEPT, PAPER, Box, levels, token_panel
from winnow.video.clip import Video
from winnow.video.process import MISSING

MOVING = (".mp4", ".gif")  # endings of short videos
SECONDS = 0.5  # that a short video shows each frame
_SIDE = {"sheet": 240, "film": 448}  # pixels of the longer side of a frame
_STRIP = 20  # pixels below a frame, for its time
Evidence = Mapping[int, Sequence[Box]]
_NOTHING: Evidence = {}


def contact_sheet(
    video: Video,
    layout: Layout,
    kept: Any,
    *,
    shown: Box | None = None,
    caption: str = "",
    evidence: Evidence = _NOTHING,
) -> Image.Image:
    """All frames in reading order; kept tokens are clear inside a thin line, dropped ones grey and dim.

    Args:
        video: whose frames went to the processor.
        layout: of the video as it entered the LM.
        kept: as in `winnow.overlay.levels`.
        shown: the part of a frame that the model was shown, in its pixels; default: all of it.
        caption: a line to write below.
        evidence: boxes to outline, in pixels of the video, by frame.
    """
    panels = list(_panels(video, layout, kept, shown, evidence, _SIDE["sheet"]))
    wide, high = panels[0].size
    columns = _columns(len(panels), math.sqrt(len(panels) * 1.6 * high / wide))
    rows, gap, text = math.ceil(len(panels) / columns), 6, 24 if caption else 0
    sheet = Image.new("RGB", (columns * (wide + gap) - gap, rows * (high + gap) - gap + text), PAPER)
    for number, own in enumerate(panels):
        sheet.paste(own, (number % columns * (wide + gap), number // columns * (high + gap)))
    if caption:
        _write(sheet, caption, sheet.height - text + 3, 14)
    return sheet


def film(
    video: Video, layout: Layout, kept: Any, *, shown: Box | None = None, evidence: Evidence = _NOTHING
) -> list[Image.Image]:
    """The same frames one by one, for `save_film`."""
    return list(_panels(video, layout, kept, shown, evidence, _SIDE["film"]))


def save_film(frames: list[Image.Image], path: Path, *, seconds: float = SECONDS, note: str = "") -> None:
    """Write a short video: .mp4 by PyAV, .gif by Pillow.

    Args:
        seconds: that each frame is shown.
        note: a comment to write into an .mp4.

    Raises:
        UnsupportedError: there is no PyAV, or it has no encoder; a .gif needs none.
        WinnowError: the name ends otherwise.
    """
    ending = path.suffix.lower()
    if ending not in MOVING:
        raise WinnowError(f"{path} is not the name of a short video; end it in one of {', '.join(MOVING)}.")
    if ending == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 * seconds), loop=0)
        return
    av = _encoder()
    name = next((n for n in ("libx264", "libopenh264", "mpeg4") if n in av.codecs_available), None)
    if name is None:
        raise UnsupportedError("This PyAV cannot encode MP4; name a .gif instead.")
    wide, high = (side - side % 2 for side in frames[0].size)  # encoders take even sides
    with av.open(str(path), "w", format="mp4") as container:
        if note:
            container.metadata["comment"] = note
        stream = container.add_stream(name, rate=Fraction(1 / seconds).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
        for frame in frames:
            pixels = np.asarray(frame.crop((0, 0, wide, high)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _columns(count: int, ideal: float) -> int:
    """Columns of a sheet: near the ideal, and leaving as few places of the last row empty as can be."""
    near = range(max(1, math.ceil(0.6 * ideal)), max(1, math.floor(1.5 * ideal)) + 1)
    return min((n for n in near if n <= count), key=lambda n: (-count % n, abs(n - ideal)), default=1)


def _encoder() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        pass
    raise UnsupportedError(f"{MISSING} A .gif needs none.")


def _panels(
    video: Video, layout: Layout, kept: Any, shown: Box | None, evidence: Evidence, side: int
) -> Iterator[Image.Image]:
    """A picture of each frame, with its time below. Where frames share tokens, both show them."""
    found = levels(layout, kept)
    frame_of = layout.place[layout.content, 1]
    boxes = layout.boxes[layout.content]
    grid = int(frame_of.max()) + 1
    if grid > len(video):
        raise WinnowError(
            f"The layout has {grid} frames and the video {len(video)}; draw the video that was asked about."
        )
    share = math.ceil(len(video) / grid)  # frames that make one row of tokens in time
    for number, (pixels, time) in enumerate(zip(video.frames, video.times, strict=True)):
        own = frame_of == number // share
        image = Image.fromarray(pixels)
        scale = min(1.0, side / max(image.size))
        part = None if shown is None else (scale * shown[0], scale * shown[1], scale * shown[2], scale * shown[3])
        small = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
        )
        least = max(1, round(side * min(image.size) / max(image.size)))
        outlined = tuple((scale * a, scale * b, scale * c, scale * d) for a, b, c, d in evidence.get(number, ()))
        drawn = token_panel(small, boxes[own], found[own], outlined, shown=part, smallest=least)
        cell = Image.new("RGB", (drawn.width, drawn.height + _STRIP), PAPER)
        cell.paste(drawn, (0, 0))
        _write(cell, f"{time:.2f} s   {int((found[own] == KEPT).sum())}/{int(own.sum())}", drawn.height + 3, 12)
        yield cell


def _write(sheet: Image.Image, text: str, top: int, size: int) -> None:
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    while pen.textlength(text, font) > sheet.width - 8 and len(text) > 1:
        text = text[:-2] + "…"
    pen.text((4, top), text, fill=(235, 235, 235), font=font)
