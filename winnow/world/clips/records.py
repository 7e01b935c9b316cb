"""The records of a clip: what is seen when and where, and questions with their evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from winnow.world.clips.names import FPS
from winnow.world.items import Box

Kind = Literal["glyph", "shape", "text"]
Act = Literal["still", "visit", "repeat", "cross", "hit", "target", "word"]
Center = tuple[float, float]


class Sight(NamedTuple):
    """A box of one frame."""

    frame: int
    box: Box


@dataclass(slots=True, eq=False)
class Track:
    """One thing through the clip.

    Attributes:
        centers: (x, y) in each frame, None where the thing is not there.
        visits: [start, end) seconds in which it is there.
        enters, leaves: whether it comes or goes while the camera looks, and not with a cut or an end of the clip.
        direction: of its motion; "" is none.
        color: of a shape; `later` from the second `changes` on, where it changes.
        partner: of a hit: the glyph that touches, the shape that changes.
        boxes: what can be seen of it in each frame.
    """

    kind: Kind
    act: Act
    name: str
    extent: int
    centers: list[Center | None]
    visits: tuple[tuple[int, int], ...]
    enters: bool = False
    leaves: bool = False
    direction: str = ""
    color: str = ""
    later: str = ""
    changes: int | None = None
    mirrored: bool = False
    partner: Track | None = field(default=None, repr=False)
    boxes: list[Box | None] = field(default_factory=list, repr=False)

    @property
    def start(self) -> int:
        """The second in which it is first seen."""
        return self.visits[0][0]

    def color_at(self, frame: int) -> str:
        return self.later if self.changes is not None and frame >= FPS * self.changes else self.color

    def sights(self, start: int, end: int) -> list[Sight]:
        """Where it is seen in the seconds [start, end)."""
        frames = range(max(0, FPS * start), min(len(self.boxes), FPS * end))
        return [Sight(frame, box) for frame in frames if (box := self.boxes[frame]) is not None]


@dataclass(frozen=True, slots=True)
class ClipQuestion:
    """`evidence` is empty where the answer is an absence: then it depends on the whole clip."""

    type: str
    text: str
    answer: str
    evidence: tuple[Sight, ...]


@dataclass(frozen=True, slots=True)
class Clip:
    """Moving pictures, what is in them, and questions about them. `pixels` is uint8 [frames, side, side, 3]."""

    seed: int
    side: int
    split: str
    pixels: np.ndarray
    tracks: tuple[Track, ...]
    cuts: tuple[int, ...]
    questions: tuple[ClipQuestion, ...]

    @property
    def frames(self) -> int:
        return len(self.pixels)

    @property
    def seconds(self) -> int:
        return self.frames // FPS

    @property
    def images(self) -> list[Image.Image]:
        """The frames as RGB images of Pillow."""
        return [Image.fromarray(frame) for frame in self.pixels]
