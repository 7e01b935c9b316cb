"""Answers that a plan loses against the full model on the same questions, and what that proves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from winnow.bench.intervals import paired
from winnow.core.errors import WinnowError

NORMAL = NormalDist()


def checked_confidence(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.5 <= value < 1:
        raise WinnowError(f"confidence={value!r}; allowed: from 0.5 (the estimate itself) to below 1, such as 0.95.")
    return float(value)


@dataclass(frozen=True)
class Loss:
    """Which of the same questions the full model and a plan have right."""

    full: tuple[bool, ...] = field(default=(), repr=False)
    mine: tuple[bool, ...] = field(default=(), repr=False)

    @property
    def n(self) -> int:
        return len(self.full)

    @property
    def lost(self) -> int:
        """Questions that only the full model has right."""
        return sum(a and not b for a, b in zip(self.full, self.mine, strict=True))

    @property
    def gained(self) -> int:
        """Questions that only the plan has right."""
        return sum(b and not a for a, b in zip(self.full, self.mine, strict=True))

    @property
    def value(self) -> float:
        """Lost less gained, as a share of all questions."""
        return (self.lost - self.gained) / self.n if self.n else math.nan

    def at_most(self, confidence: float) -> float:
        """Upper end of the one-sided interval (Newcombe's for paired proportions)."""
        return -paired(self.full, self.mine, NORMAL.inv_cdf(confidence)).low

    def at_least(self, confidence: float) -> float:
        """Lower end of the one-sided interval."""
        return -paired(self.full, self.mine, NORMAL.inv_cdf(confidence)).high

    def chance(self, limit: float) -> float:
        """How probable it looks that no more than `limit` is lost; for ranking, not for claims.

        Half a question is added to what is lost and to what is gained, so that few questions say little.
        """
        n = self.n + 1
        lost, gained = self.lost + 0.5, self.gained + 0.5
        mean = (lost - gained) / n
        spread = math.sqrt(max(lost + gained - n * mean * mean, 0.0)) / n
        return NORMAL.cdf((limit - mean) / spread) if spread else float(mean <= limit)

    def enough(self, limit: float, confidence: float) -> int | None:
        """About how many questions would prove what these suggest; None where they suggest a loss above the limit."""
        room = limit - self.value
        if not self.n or room <= 0:
            return None
        apart = max(self.lost + self.gained, 1) / self.n
        return math.ceil(NORMAL.inv_cdf(confidence) ** 2 * apart / room**2)


def loss_of(full: dict[str, bool], mine: dict[str, bool], questions: Sequence[str]) -> Loss:
    """The loss on those of some questions that both have answered."""
    both = [q for q in questions if q in full and q in mine]
    return Loss(tuple(full[q] for q in both), tuple(mine[q] for q in both))
