"""Every method at one budget beside choices that look at nothing."""

from __future__ import annotations

from typing import NamedTuple

from tests.methods.directional import Gap, Sample, at_random, blind_cuts, evenly, gap
from winnow.core.errors import UnsupportedError
from winnow.core.method import Method
from winnow.core.registry import method_class
from winnow.methods.pixelprune import PixelPrune

BUDGET = 32
CONTENT = 256
OWN = {"pixelprune": PixelPrune(threshold=0.2, std=0.27)}  # what has no budget
BLIND = {"an even grid": evenly, "random tokens": at_random}


class Beside(NamedTuple):
    """A method's answers beside those of blind choices before the LM that are as many in the mean over its layers, and
    its evidence beside that of as many as it leaves at last."""

    method: str
    last: float
    averaged: float
    right: float
    right_less: dict[str, Gap]
    left: float
    left_less: dict[str, Gap]

    def line(self) -> list[str]:
        shown = [self.method, f"{self.last:.0f}", f"{self.averaged:.0f}"]
        shown += [f"{self.right:.3f}", *map(str, self.right_less.values())]
        return [*shown, f"{self.left:.3f}", *map(str, self.left_less.values())]


HEADS = [
    "method",
    "tokens at last",
    "over layers",
    "right",
    *(f"less {name}" for name in BLIND),
    "evidence left",
    *(f"less {name}" for name in BLIND),
]


def at_budget(slug: str) -> Method:
    return OWN[slug] if slug in OWN else method_class(slug).configured().at_budget(BUDGET, CONTENT)


def beside(s: Sample, slug: str) -> Beside | None:
    try:
        plan = at_budget(slug)
        said, kept = s.answers(plan)
    except UnsupportedError:
        return None
    last, averaged = kept.sum(1).double().mean().item(), s.seen(plan).mean().item()
    blind = {name: blind_cuts(select, (0,), (round(averaged),)) for name, select in BLIND.items()}
    alone = {name: blind_cuts(select, (0,), (round(last),)) for name, select in BLIND.items()}
    return Beside(
        slug,
        last,
        averaged,
        said.mean(),
        {name: gap(said, s.right(other)) for name, other in blind.items()},
        s.left(plan).mean(),
        {name: gap(s.left(plan), s.left(other)) for name, other in alone.items()},
    )


def below(rows: list[Beside]) -> list[str]:
    """A line for each blind choice and measure: who falls below it."""
    lines = []
    for name in BLIND:
        for what, of in (
            ("answer fewer questions than", "right_less"),
            ("leave less of the evidence than", "left_less"),
        ):
            found = [row.method for row in rows if getattr(row, of)[name].high < 0]
            lines.append(f"- {what} {name}: {', '.join(found) or 'none'}")
    return lines
