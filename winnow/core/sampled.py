"""Sampled: how the frames of a video were chosen, as the ledger says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.core.reduction import Reduction


@dataclass(frozen=True)
class Sampled:
    """How frames came out of a file, or out of frames that were given, and what steps at `frames` left of them.

    Attributes:
        rule: as the sampling says it; `given` for frames that came as such.
        given: frames of the file.
        picked: frames that the rule named.
        taken: frames that were decoded; fewer where they were thinned to the limit, or where the file is damaged.
        kept: frames that are left after the steps.
        numbers: which they are, counted from 0; −1 for a thumbnail of several.
        duration: seconds of the file.
        fps: mean frames per second of the file; None where it has only one frame.
        container, codec: of the file; empty for frames that came as such.
        broken: whether frames at the end are missing, because the file is damaged or cut off.
        reductions: (point, slug, map over the frames) of the steps, in order.
        plan: key of the plan whose steps were run; empty where none was.
    """

    rule: str
    given: int
    picked: int
    taken: int
    kept: int
    numbers: tuple[int, ...]
    duration: float
    fps: float | None
    container: str = ""
    codec: str = ""
    broken: bool = False
    reductions: tuple[tuple[str, str, Reduction], ...] = field(default=(), compare=False)
    plan: str = ""

    def facts(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        names = ("rule", "given", "picked", "taken", "kept", "duration", "fps", "container", "codec", "broken")
        return {name: getattr(self, name) for name in names} | {"numbers": list(self.numbers)}

    def __str__(self) -> str:
        thinned = f", thinned from {self.picked}" if self.taken < self.picked and not self.broken else ""
        ending = "; the file is damaged, and frames at its end are missing" if self.broken else ""
        steps = "".join(f"; {slug} kept {r.m} of {r.n}" for _, slug, r in self.reductions)
        return f"{self.taken} of {self.given} frames ({self.rule}{thinned}){ending}{steps}"
