"""Layout: what the tokens of one item are, and which part of the picture each of them covers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from winnow.core.errors import WinnowError

CONTENT, SEPARATOR, CLS, REGISTER, PAD = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Layout:
    """The tokens of one item, in the order in which they stand.

    Two layouts are equal when their keys are. Arrays are read-only and have one row for each token.

    Attributes:
        key: the numbers that made this layout (family, grid, tiles, …).
        kind: CONTENT, SEPARATOR (newlines, tile breaks), CLS, REGISTER, or PAD (a patch of letterbox that the tower
            sees and the LM does not).
        tile: the tile (crop; thumbnail first) that a content token came from; −1 for others.
        cell: its row of the tower's output (tile-major, patches merged), where its vision signals lie; −1 for others.
        place: grid, frame, row, column of a content token; −1 for others. Neighbours share the grid and the frame.
        boxes: x0, y0, x1, y1 as fractions of the picture that the model was shown; NaN for others. Of a sound, x is
            time, and y spans all of it.
        seconds: that a sound lasts, as far as its tokens cover it; None for pictures and videos.
    """

    key: Hashable
    kind: Int[np.ndarray, " n"] = field(compare=False, repr=False)
    tile: Int[np.ndarray, " n"] = field(compare=False, repr=False)
    cell: Int[np.ndarray, " n"] = field(compare=False, repr=False)
    place: Int[np.ndarray, "n 4"] = field(compare=False, repr=False)
    boxes: Float[np.ndarray, "n 4"] = field(compare=False, repr=False)
    seconds: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for array in (self.kind, self.tile, self.cell, self.place, self.boxes):
            array.setflags(write=False)

    @staticmethod
    def grid(h: int, w: int, t: int = 1, *, cls: bool = False, newline: bool = False) -> Layout:
        """A plain grid of t × h × w tokens, optionally with [CLS] before it and a newline after each row."""
        parts = [cls_token()] if cls else []
        parts.append(grid_rows(h, w, t, newline=newline))
        return Layout.of(("grid", t, h, w, cls, newline), parts)

    @staticmethod
    def sequence(n: int) -> Layout:
        """n tokens in a row, of which it is not known what part of the picture they cover."""
        rows = grid_rows(1, n)
        return Layout.of(("sequence", n), [{**rows, "boxes": np.full((n, 4), np.nan)}])

    @staticmethod
    def sound(n: int, each: float) -> Layout:
        """n tokens in a row, one behind the other in time.

        Args:
            each: seconds that a token covers.
        """
        return replace(Layout.of(("sound", n, each), [grid_rows(1, n)]), seconds=n * each)

    @staticmethod
    def of(key: Hashable, parts: Iterable[dict[str, np.ndarray]]) -> Layout:
        """Join parts (see `grid_rows`, `separators`) in order."""
        parts = list(parts)
        arrays: dict[str, Any] = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return Layout(key, **arrays)

    @property
    def n(self) -> int:
        """All tokens of the item, separators included."""
        return len(self.kind)

    @property
    def content(self) -> Int[np.ndarray, " v"]:
        """Indices of the content tokens."""
        return np.flatnonzero(self.kind == CONTENT)

    @property
    def n_content(self) -> int:
        return int((self.kind == CONTENT).sum())

    @property
    def n_separators(self) -> int:
        return int((self.kind == SEPARATOR).sum())

    @property
    def tiles(self) -> Int[np.ndarray, " v"]:
        """The tile of each content token, numbered from 0 without gaps."""
        return np.unique(self.tile[self.content], return_inverse=True)[1]

    @property
    def times(self) -> Float[np.ndarray, "v 2"]:
        """From when to when each content token of a sound lasts, in seconds."""
        if self.seconds is None:
            raise WinnowError(
                "times: only the tokens of a sound have them, and this is the layout of a picture or video."
            )
        return self.boxes[self.content][:, [0, 2]] * self.seconds

    def covering(self, boxes: Iterable[Sequence[float]], share: float = 0.15) -> Bool[np.ndarray, " v"]:
        """Which content tokens lie on any of these boxes (fractions of the picture).

        A token counts when the boxes cover at least `share` of it; for each box that covers no token so far, the one
        that it covers most counts, so that no evidence is without a token.

        Args:
            boxes: x0, y0, x1, y1; with t0, t1 behind them (fractions of a clip) only tokens of that stretch of time
                count, otherwise those of all frames.
        """
        at = self.boxes[self.content]
        area = np.maximum((at[:, 2] - at[:, 0]) * (at[:, 3] - at[:, 1]), 1e-12)
        found = np.zeros(len(at), dtype=bool)
        for x0, y0, x1, y1, *when in boxes:
            if not (x0 < x1 and y0 < y1):
                raise WinnowError(f"Box {(x0, y0, x1, y1)} is empty; expected x0 < x1 and y0 < y1, as fractions.")
            wide = np.clip(np.minimum(at[:, 2], x1) - np.maximum(at[:, 0], x0), 0, None)
            high = np.clip(np.minimum(at[:, 3], y1) - np.maximum(at[:, 1], y0), 0, None)
            cover = wide * high / area
            if when:
                cover = cover * self._during(*when)
            hit = cover >= share
            if not hit.any() and cover.max(initial=0) > 0:
                hit = cover >= cover.max()
            found |= hit
        return found

    def _during(self, start: float, end: float) -> Bool[np.ndarray, " v"]:
        """Which content tokens show something of a stretch of time, [start, end) as fractions of the clip."""
        if not 0 <= start < end <= 1:
            raise WinnowError(f"The stretch {(start, end)} is empty; expected 0 ≤ t0 < t1 ≤ 1, as fractions of a clip.")
        frame = self.place[self.content, 1]
        count = frame.max(initial=0) + 1
        slack = 1e-6  # of rounding, so that no neighbour counts
        return (frame < end * count - slack) & (frame + 1 > start * count + slack)


def grid_rows(
    h: int,
    w: int,
    t: int = 1,
    *,
    grid: int = 0,
    tile: np.ndarray | int = 0,
    cell: np.ndarray | None = None,
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    newline: bool = False,
) -> dict[str, np.ndarray]:
    """The rows of a t × h × w grid of content tokens that covers `box`; `tile` and `cell` may vary over `[t, h, w]`."""
    frame, row, col = np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")
    x0, y0, x1, y1 = box
    wide, high = (x1 - x0) / w, (y1 - y0) / h
    boxes = np.stack([x0 + col * wide, y0 + row * high, x0 + (col + 1) * wide, y0 + (row + 1) * high], -1)
    tile = np.full(frame.shape, tile) if np.ndim(tile) == 0 else np.asarray(tile).reshape(frame.shape)
    cell = np.arange(frame.size).reshape(frame.shape) if cell is None else np.asarray(cell).reshape(frame.shape)
    place = np.stack([np.full_like(frame, grid), frame, row, col], -1)
    kind = np.full(frame.shape, CONTENT)
    if newline:
        pad = lambda a, v: np.concatenate([a, np.full((*a.shape[:2], 1, *a.shape[3:]), v, dtype=a.dtype)], 2)  # noqa: E731
        kind, tile, cell, place, boxes = (
            pad(kind, SEPARATOR),
            pad(tile, -1),
            pad(cell, -1),
            pad(place, -1),
            pad(boxes, np.nan),
        )
    return {
        "kind": kind.reshape(-1).astype(np.int64),
        "tile": tile.reshape(-1).astype(np.int64),
        "cell": cell.reshape(-1).astype(np.int64),
        "place": place.reshape(-1, 4).astype(np.int64),
        "boxes": boxes.reshape(-1, 4).astype(np.float64),
    }


def separators(count: int) -> dict[str, np.ndarray]:
    """`count` separator tokens."""
    return _special(SEPARATOR, count)


def padding(count: int) -> dict[str, np.ndarray]:
    """`count` tokens that stand for nothing."""
    return _special(PAD, count)


def cls_token() -> dict[str, np.ndarray]:
    """One [CLS] token."""
    return _special(CLS)


def _special(kind: int, count: int = 1) -> dict[str, np.ndarray]:
    return {
        "kind": np.full(count, kind, dtype=np.int64),
        "tile": np.full(count, -1, dtype=np.int64),
        "cell": np.full(count, -1, dtype=np.int64),
        "place": np.full((count, 4), -1, dtype=np.int64),
        "boxes": np.full((count, 4), np.nan),
    }
