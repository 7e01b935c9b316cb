"""A bank of textured and photograph-like backgrounds, computed once per process from a fixed seed."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageFilter

SIDE = 400
COUNT = 60


def _cloud(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise of about unit scale with `cells` bumps along a side: float32 [SIDE, SIDE, 3]."""
    low = rng.normal(0, 1, (cells, cells, 3)).astype(np.float32)
    planes = [Image.fromarray(low[..., i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for i in range(3)]
    return np.stack([np.asarray(p) for p in planes], -1)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Noise at three scales, often with stripes."""
    out = np.zeros((SIDE, SIDE, 3), np.float32) + rng.integers(40, 220, 3)
    for cells in (4, 10, 24):
        out += _cloud(rng, cells) * rng.uniform(4, 26)
    if rng.random() < 0.5:
        y, x = np.mgrid[:SIDE, :SIDE]
        angle, frequency = rng.uniform(0, np.pi), rng.uniform(0.1, 0.8)
        out += (np.sin((y * np.sin(angle) + x * np.cos(angle)) * frequency) * rng.uniform(5, 25))[..., None]
    return out + rng.normal(0, rng.uniform(2, 14), out.shape)


def _landscape(rng: np.random.Generator) -> np.ndarray:
    """A sky that fades, an uneven horizon, ground that gets coarser towards the viewer."""
    y = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    sky = rng.uniform(90, 200, 3) * (1 - y) + rng.uniform(150, 240, 3) * y + _cloud(rng, 5) * 12
    ground = rng.uniform(40, 150, 3) + _cloud(rng, 40) * (4 + 18 * y) + _cloud(rng, 8) * 10
    horizon = rng.uniform(0.3, 0.7) + 0.06 * _cloud(rng, 6)[:1, :, :1]
    return np.where(y < horizon, sky, ground) + rng.normal(0, 4, (SIDE, SIDE, 3))


def _bokeh(rng: np.random.Generator) -> np.ndarray:
    """Blurred discs of light out of focus."""
    out = (rng.uniform(20, 120, 3) + _cloud(rng, 4) * 20).astype(np.float32)
    y, x = np.mgrid[:SIDE, :SIDE]
    for _ in range(int(rng.integers(12, 30))):
        cy, cx, radius = (*rng.uniform(0, SIDE, 2), rng.uniform(10, 45))
        near = tuple(slice(max(0, int(c - radius)), int(c + radius) + 2) for c in (cy, cx))  # there is no light beyond
        disc = np.clip(radius - np.hypot(y[near] - cy, x[near] - cx), 0, 3) / 3
        out[near] += disc[..., None] * rng.uniform(10, 110, 3) * 0.6
    picture = Image.fromarray(np.clip(out, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(2))
    return np.asarray(picture, np.float32) + rng.normal(0, 3, out.shape)


def _bricks(rng: np.random.Generator) -> np.ndarray:
    """Courses of bricks with mortar between them, each brick of its own shade."""
    height, width = int(rng.integers(14, 34)), int(rng.integers(30, 70))
    y, x = np.mgrid[:SIDE, :SIDE]
    row = y // height
    shifted = x + (row % 2) * (width // 2)
    shade = rng.normal(0, 14, (SIDE // height + 1, SIDE // width + 2))[row, shifted // width]
    mortar = (y % height < 3) | (shifted % width < 3)
    out = np.where(mortar[..., None], rng.uniform(120, 200, 3), rng.uniform(70, 190, 3) + shade[..., None])
    return out + _cloud(rng, 50) * 6 + rng.normal(0, 5, out.shape)


@cache
def bank() -> np.ndarray:
    """uint8 [COUNT, SIDE, SIDE, 3]."""
    rng = np.random.default_rng(20)
    makers = (_texture, _texture, _landscape, _bokeh, _bricks)
    pictures = np.empty((COUNT, SIDE, SIDE, 3), np.uint8)
    for i in range(COUNT):
        pictures[i] = np.clip(makers[i % len(makers)](rng), 0, 255)
    return pictures
