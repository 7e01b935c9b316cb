"""Entered: how a picture of a request entered it, as the ledger says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.core.reduction import Reduction
    from winnow.core.step import Recut

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Entered:
    """Which picture of a request one is, and what steps at `prompt` and `pixels` left of it.

    Attributes:
        number: which of the pictures that were given, counted from 0.
        given: how many were given.
        size: height and width of the picture that was given.
        box: left, top, right and bottom, in its pixels, of the part that entered.
        scaled: height and width to which that part was scaled.
        grid: rows and columns of tokens that the model makes of it; None where that is not known.
        full: the same of the picture that was given, as it was.
        steps: (point, slug, what it asked for) of the steps that changed something: a map over the pictures, or a cut.
        plan: key of the plan whose steps were run.
    """

    number: int
    given: int
    size: tuple[int, int]
    box: Box
    scaled: tuple[int, int]
    grid: tuple[int, int] | None = None
    full: tuple[int, int] | None = None
    steps: tuple[tuple[str, str, Reduction | Recut], ...] = field(default=(), compare=False)
    plan: str = ""

    @property
    def whole(self) -> bool:
        """Whether the picture entered as it was given."""
        high, wide = self.size
        return self.scaled == self.size and self.box == (0, 0, wide, high)

    def seen(self, box: Box) -> Box:
        """A box of the picture that was given, in pixels of what entered; outside of it where the part was cut off."""
        left, top, right, bottom = self.box
        wide, high = self.scaled[1] / (right - left), self.scaled[0] / (bottom - top)
        x0, y0, x1, y1 = box
        return ((x0 - left) * wide, (y0 - top) * high, (x1 - left) * wide, (y1 - top) * high)

    def facts(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        names = ("number", "given", "size", "box", "scaled", "grid", "full")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}

    def __str__(self) -> str:
        which = f"picture {self.number + 1} of {self.given}"
        if self.whole:
            return f"{which}, as it was given"
        (high, wide), corners = self.scaled, ", ".join(f"{x:g}" for x in self.box)
        part = "" if self.box == (0, 0, self.size[1], self.size[0]) else f", its box ({corners})"
        return f"{which}{part}, scaled from {self.size[1]} × {self.size[0]} to {wide} × {high} pixels"
