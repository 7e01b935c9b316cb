"""Layouts of the toy's towers: tile-major, each tile [CLS] + h × w."""

from __future__ import annotations

import numpy as np

from winnow.core.layout import CLS, Layout, grid_rows, separators

from .toy import Picture, randn


def _tile(content: dict[str, np.ndarray], tile: int) -> list[dict[str, np.ndarray]]:
    cls = separators(1) | {"kind": np.array([CLS]), "tile": np.array([tile])}
    return [cls, content]


def clip_tower(h: int, w: int, frames: int) -> Layout:
    """The tower's rows of a clip: every frame is a tile."""
    parts: list[dict[str, np.ndarray]] = []
    for t in range(frames):
        rows = grid_rows(h, w, tile=t, cell=t * h * w + np.arange(h * w))
        rows["place"][:, 1] = t
        parts += _tile(rows, t)
    return Layout.of(("toy tower", h, w, frames), parts)


def picture(h: int, w: int, *, frames: int = 1, newline: bool = False, seed: int = 0, width: int = 16) -> Picture:
    """A picture of one tile, or a clip whose frames are the tower's tiles."""
    lm = Layout.grid(h, w, frames, newline=newline)
    return Picture(randn(frames, h * w, width, seed=seed), clip_tower(h, w, frames), lm)
