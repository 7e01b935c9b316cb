"""The overlay: a picture with its kept tokens clear, its dropped tokens dimmed, and the evidence outlined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image, ImageDraw, ImageFont

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction

Box = tuple[float, float, float, float]

DROPPED, MERGED, KEPT = 0, 1, 2
SMALLEST = 448  # pixels of the shorter side of a panel: smaller pictures are scaled up, so that tokens can be seen
LARGEST = 2**24  # pixels of a panel that was scaled up: a strip would fill the memory
KEPT_LINE = (255, 214, 10)
EVIDENCE_LINE = (255, 45, 150)
PAPER = (24, 24, 27)


def shown_box(processor: Any, size: tuple[int, int]) -> Box:
    """The part of a picture that the model is shown, in pixels: x0, y0, x1, y1.

    CLIP's processors scale the shorter side and cut out the centre; some pad to a square first, so that the box reaches
    beyond the picture. Processors that tile (LLaVA-NeXT) or take any size (Qwen) show all of it.

    Args:
        processor: a processor, or its image processor.
        size: width and height of the picture.
    """
    images = getattr(processor, "image_processor", processor)
    width, height = size
    x0, y0, x1, y1 = 0.0, 0.0, float(width), float(height)
    if getattr(images, "image_grid_pinpoints", None):
        return x0, y0, x1, y1
    if getattr(images, "do_pad", False) and hasattr(images, "pad_to_square"):
        side = max(width, height)
        x0, y0 = float(-((side - width) // 2)), float(-((side - height) // 2))
        x1, y1 = x0 + side, y0 + side
    if not getattr(images, "do_center_crop", False):
        return x0, y0, x1, y1
    wide, high = x1 - x0, y1 - y0
    to_wide, to_high = _resized(images, wide, high)
    crop = images.crop_size
    left, top = (to_wide - crop["width"]) // 2, (to_high - crop["height"]) // 2
    per_x, per_y = wide / to_wide, high / to_high
    return (
        x0 + left * per_x,
        y0 + top * per_y,
        x0 + (left + crop["width"]) * per_x,
        y0 + (top + crop["height"]) * per_y,
    )


def _resized(images: Any, wide: float, high: float) -> tuple[int, int]:
    """Width and height after the processor's resize, rounded as it rounds."""
    if not getattr(images, "do_resize", False):
        return int(wide), int(high)
    size = {name: value for name, value in dict(images.size).items() if value}
    if "height" in size:
        return size["width"], size["height"]
    if "shortest_edge" not in size:
        raise WinnowError(f"Cannot tell what {type(images).__name__} shows of a picture: its size is {size}.")
    short = size["shortest_edge"]
    long = int(short * max(wide, high) / min(wide, high))
    return (short, long) if wide <= high else (long, short)


def covered(layout: Layout, evidence: Iterable[Box], shown: Box) -> Bool[np.ndarray, " v"]:
    """Which content tokens of a picture lie on its evidence.

    Args:
        evidence: boxes, in pixels of the picture.
        shown: the part of the picture that the model was shown (`shown_box`), in pixels.
    """
    x0, y0, x1, y1 = shown
    wide, high = x1 - x0, y1 - y0
    shares = [((a - x0) / wide, (b - y0) / high, (c - x0) / wide, (d - y0) / high) for a, b, c, d in evidence]
    return layout.covering(shares)


def levels(layout: Layout, kept: Reduction | Sequence[int] | np.ndarray | Any) -> Int[np.ndarray, " v"]:
    """DROPPED, MERGED or KEPT for each content token of an item.

    Args:
        layout: of the item as it entered the LM, V content tokens.
        kept: the ids of the kept tokens, a bool mask of length V, or the item's provenance: a Reduction of V tokens,
            whose representatives are kept and whose other sources were merged into them.
    """
    v = layout.n_content
    found = np.zeros(v, dtype=np.int64)
    if isinstance(kept, Reduction):
        if kept.n != v or kept.lanes:
            raise WinnowError(
                f"The overlay takes a map of one item with {v} content tokens; got {kept.n}, lanes {kept.lanes}."
            )
        found[kept.kept.cpu().numpy()] = MERGED
        found[kept.representatives[kept.sourced].cpu().numpy()] = KEPT
        return found
    ids = np.asarray(kept.cpu() if hasattr(kept, "cpu") else kept)
    if ids.dtype == bool:
        if ids.shape != (v,):
            raise WinnowError(f"The mask of kept tokens has shape {ids.shape}; the item has {v} content tokens.")
        ids = np.flatnonzero(ids)
    if ids.size and not (ids.min() >= 0 and ids.max() < v):
        raise WinnowError(f"Kept ids run from {ids.min()} to {ids.max()}; the item has content tokens 0 … {v - 1}.")
    found[ids.astype(np.int64)] = KEPT
    return found


def overlay(
    image: Image.Image,
    layout: Layout,
    kept: Reduction | Sequence[int] | np.ndarray | Any,
    *,
    evidence: Iterable[Box] = (),
    shown: Box | None = None,
    caption: str = "",
) -> Image.Image:
    """Draw what was kept of a picture.

    Kept tokens stay clear inside a thin line, tokens merged into them are half clear, dropped ones are grey and dim,
    and what the model never saw is darker still. An item with several grids (thumbnail and tiles) gets a panel for
    each.

    Args:
        image: the picture, upright, as it went to the processor.
        layout: of the item as it entered the LM.
        kept: see `levels`.
        evidence: boxes to outline, in pixels of the picture.
        shown: the part that the model was shown (`shown_box`), in pixels; default: all of it.
        caption: a line to write below.
    """
    found = levels(layout, kept)
    place = layout.place[layout.content]
    panels = [
        token_panel(image, layout.boxes[layout.content][chosen], found[chosen], tuple(evidence), shown)
        for panel in np.unique(place[:, :2], axis=0)
        for chosen in [(place[:, :2] == panel).all(1)]
    ]
    return _sheet(panels or [token_panel(image, np.zeros((0, 4)), found, tuple(evidence), shown)], caption)


def panel_size(size: tuple[int, int], smallest: int = SMALLEST) -> tuple[int, int]:
    """Width and height of a panel of the overlay; size: those of the picture, smallest: of the shorter side."""
    zoom = _zoom(size, smallest)
    return max(1, round(size[0] * zoom)), max(1, round(size[1] * zoom))


def _zoom(size: tuple[int, int], smallest: int) -> float:
    zoom = smallest / min(size)
    zoom = round(zoom) if zoom > 1.5 else zoom  # whole pixels stay crisp
    return max(1.0, min(zoom, math.isqrt(LARGEST // (size[0] * size[1]))))


def token_panel(
    image: Image.Image,
    boxes: np.ndarray,
    found: np.ndarray,
    evidence: tuple[Box, ...] = (),
    shown: Box | None = None,
    smallest: int = SMALLEST,
) -> Image.Image:
    """One grid of tokens over the picture.

    Args:
        boxes: `[n, 4]` of the tokens, as fractions of what the model was shown.
        found: `[n]` of `levels`.
        evidence, shown: as in `overlay`.
        smallest: pixels of the shorter side, to which smaller pictures are scaled up.
    """
    zoom, size = _zoom(image.size, smallest), panel_size(image.size, smallest)
    clear = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    x0, y0, x1, y1 = (zoom * edge for edge in shown or (0, 0, *image.size))
    seen, level = np.zeros(clear.shape[:2], bool), np.zeros(clear.shape[:2], np.int64)
    scaled = boxes * [x1 - x0, y1 - y0, x1 - x0, y1 - y0] + [x0, y0, x0, y0]
    for (left, top, right, bottom), value in zip(np.rint(scaled).astype(int).clip(0), found, strict=True):
        seen[top:bottom, left:right] = True
        level[top:bottom, left:right] = value
    grey = clear.mean(-1, keepdims=True).repeat(3, -1)
    dim = np.where(seen[..., None], 0.45 * grey + 22, 0.12 * grey)
    drawn = np.select([level[..., None] == KEPT, level[..., None] == MERGED], [clear, 0.5 * clear + 0.5 * dim], dim)
    drawn[_border(level == KEPT, max(1, round(min(size) / 448)))] = KEPT_LINE
    panel = Image.fromarray(drawn.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(panel)
    for box in evidence:
        left, top, right, bottom = (round(zoom * edge) for edge in box)
        pen.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=(255, 255, 255), width=1)
        pen.rectangle((left - 1, top - 1, right, bottom), outline=EVIDENCE_LINE, width=2)
    return panel


def _border(mask: Bool[np.ndarray, "h w"], width: int) -> Bool[np.ndarray, "h w"]:
    """The outermost pixels of a region, `width` deep."""
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _sheet(panels: list[Image.Image], caption: str) -> Image.Image:
    """Panels side by side, and a caption below them."""
    gap, text = 8, 22 if caption else 0
    edges = np.cumsum([0] + [panel.width + gap for panel in panels])
    sheet = Image.new("RGB", (int(edges[-1]) - gap, max(p.height for p in panels) + text), PAPER)
    for panel, (left, _) in zip(panels, pairwise(edges), strict=True):
        sheet.paste(panel, (int(left), 0))
    if caption:
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
        while pen.textlength(caption, font) > sheet.width - 12 and len(caption) > 1:
            caption = caption[:-2] + "…"
        pen.text((6, sheet.height - text + 3), caption, fill=(235, 235, 235), font=font)
    return sheet
