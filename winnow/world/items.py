"""The records of a scene: boxes, items, questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

Kind = Literal["glyph", "shape", "text", "bar", "panel", "clutter"]


class Box(NamedTuple):
    """Pixels x0 ≤ x < x1, y0 ≤ y < y1 of the picture."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(slots=True, eq=False)
class Item:
    """One thing in the picture.

    `name` is what questions call it (a glyph, a shape, a word; "number", "bar", "chart" or "document" for the rest).
    `partner` is the thing a label belongs to, the label of a labelled thing, or the other cell of a document's line.
    `rank` orders the bars of a chart: "shortest", "tallest" or "". `alpha` is the ink inside the box (None: all of it).
    """

    kind: Kind
    name: str
    box: Box
    color: str = ""
    text: str = ""
    rank: str = ""
    partner: Item | None = field(default=None, repr=False)
    alpha: np.ndarray | None = field(default=None, repr=False)

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return (self.box.x0 + self.box.x1) / 2, (self.box.y0 + self.box.y1) / 2

    @property
    def extent(self) -> int:
        """The longer side, in pixels."""
        return max(self.box.x1 - self.box.x0, self.box.y1 - self.box.y0)


@dataclass(frozen=True, slots=True)
class Question:
    """`evidence` is empty where the answer is an absence: then it depends on the whole picture."""

    type: str
    text: str
    answer: str
    evidence: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, what is in it, and questions about it. `pixels` is uint8 [size, size, 3]."""

    seed: int
    size: int
    split: str
    pixels: np.ndarray
    objects: tuple[Item, ...]
    questions: tuple[Question, ...]

    @property
    def image(self) -> Image.Image:
        """The picture as an RGB image of Pillow."""
        return Image.fromarray(self.pixels)
