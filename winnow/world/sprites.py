"""Sprites of glyphs, shapes and words at a wanted size, as arrays; loaded once, resized once per size."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from winnow.world.names import ASSETS, SHEET_ORDER

PAD = 3  # pixels of plate around the ink of a word
HALO = 2  # pixels of contrasting edge around a shape, so that no colour vanishes in the background


@cache
def _sheet() -> dict[str, np.ndarray]:
    with np.load(ASSETS / "glyphs.npz", allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


@cache
def _letters() -> tuple[np.ndarray, np.ndarray, str]:
    with np.load(ASSETS / "letters.npz", allow_pickle=False) as data:
        return data["masks"], data["advances"], str(data["letters"])


FACES = 5


@cache
def glyph(name: str, extent: int) -> np.ndarray:
    """The glyph with its longer side `extent` pixels: uint8 [h, w, 4] RGBA."""
    sheet, index = _sheet(), SHEET_ORDER[name]
    height, width = (int(v) for v in sheet["sizes"][index])
    pixels = sheet["palettes"][index][sheet["pixels"][index, :height, :width]]
    scale = extent / max(height, width)
    shape = max(4, round(width * scale)), max(4, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.LANCZOS))


def _draw_shape(name: str, side: int) -> Image.Image:
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    half = side / 2

    def polygon(corners: int) -> None:
        angles = [2 * math.pi * i / corners - math.pi / 2 for i in range(corners)]
        draw.polygon([(half + half * math.cos(a), half + half * math.sin(a)) for a in angles], fill=255)

    if name == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif name == "square":
        draw.rectangle((0, 0, side, side), fill=255)
    elif name == "triangle":
        polygon(3)
    elif name == "diamond":
        draw.polygon([(half, 0), (side * 0.85, half), (half, side), (side * 0.15, half)], fill=255)
    elif name == "pentagon":
        polygon(5)
    elif name == "cross":
        draw.rectangle((side * 0.35, 0, side * 0.65, side), fill=255)
        draw.rectangle((0, side * 0.35, side, side * 0.65), fill=255)
    elif name == "ring":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        draw.ellipse((side * 0.27, side * 0.27, side * 0.73, side * 0.73), fill=0)
    elif name == "semicircle":
        draw.pieslice((0, 0, side - 1, side - 1), 180, 360, fill=255)
    return image.crop(image.getbbox())


@cache
def shape(name: str, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Two masks uint8 [h, w]: the ink, and the ink with its halo. The longer side is about `extent` pixels."""
    big = _draw_shape(name, 256)
    inner = extent - 2 * HALO
    scale = inner / max(big.size)
    ink = big.resize((max(4, round(big.width * scale)), max(4, round(big.height * scale))), Image.Resampling.LANCZOS)
    padded = Image.new("L", (ink.width + 2 * HALO, ink.height + 2 * HALO), 0)
    padded.paste(ink, (HALO, HALO))
    return np.asarray(padded), np.asarray(padded.filter(ImageFilter.MaxFilter(2 * HALO + 1)))


@cache
def word(text: str, face: int, pixels: int) -> np.ndarray:
    """The word in one of FACES faces at a font size in pixels, with PAD around its ink: mask uint8 [h, w]."""
    masks, advances, letters = _letters()
    indices = [letters.index(c) for c in text]
    line = np.zeros((masks.shape[2], 60 * (len(text) + 1)), np.uint8)
    pen = 0.0
    for i in indices:
        x = round(pen)
        view = line[:, x : x + masks.shape[3]]
        np.maximum(view, masks[face, i], out=view)
        pen += float(advances[face, i])
    image = Image.fromarray(line)
    image = image.crop(image.getbbox())
    scale = pixels / 40
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    ink = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    return np.pad(ink, PAD)
