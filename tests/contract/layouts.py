"""Layouts of the toy's towers: tile-major, each tile [CLS] + h × w; and LLaVA-NeXT's two layouts of one picture."""

from __future__ import annotations

import numpy as np

from winnow.core.layout import CLS, CONTENT, PAD, Layout, grid_rows, separators

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


def next_layouts(h: int, w: int, rows: int, cols: int, pad: int) -> tuple[Layout, Layout]:
    """LLaVA-NeXT: a thumbnail and rows × cols tiles of h × w; `pad` patch rows of letterbox above and below.

    Returns the tower's layout (tile-major; the letterbox is PAD) and the LM's (thumbnail, then the mosaic without its
    letterbox, a newline after each row). Both give a patch the same tile, cell, place and box.
    """
    high, wide = rows * h, cols * w
    line, col = np.meshgrid(np.arange(high), np.arange(wide), indexing="ij")
    tile = 1 + line // h * cols + col // w
    cell = tile * h * w + line % h * w + col % w
    seen = slice(pad, high - pad)
    thumb = grid_rows(h, w)
    mosaic = grid_rows(high - 2 * pad, wide, grid=1, tile=tile[None, seen], cell=cell[None, seen], newline=True)
    lm = Layout.of(("next", h, w, rows, cols, pad), [thumb, mosaic])
    by_cell = {int(c): i for i, c in enumerate(lm.cell) if lm.kind[i] == CONTENT}
    parts: list[dict[str, np.ndarray]] = []
    for t in range(1 + rows * cols):
        mine = [by_cell.get(t * h * w + i, -1) for i in range(h * w)]
        content = {name: getattr(lm, name)[mine].copy() for name in ("kind", "tile", "cell", "place", "boxes")}
        out = np.array(mine) < 0
        content["kind"][out], content["tile"][out], content["cell"][out] = PAD, t, -1
        content["place"][out], content["boxes"][out] = -1, np.nan
        parts += _tile(content, t)
    return Layout.of(("next tower", h, w, rows, cols, pad), parts), lm


def picture(h: int, w: int, *, frames: int = 1, newline: bool = False, seed: int = 0, width: int = 16) -> Picture:
    """A picture of one tile, or a clip whose frames are the tower's tiles."""
    lm = Layout.grid(h, w, frames, newline=newline)
    return Picture(randn(frames, h * w, width, seed=seed), clip_tower(h, w, frames), lm)
