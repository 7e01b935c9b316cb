"""Accuracy retained, with a paired interval in closed form: the same answers always give the same interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from winnow.bench.meters import Z


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def retained(full: Sequence[bool], method: Sequence[bool]) -> Interval | None:
    """Right answers of the method over those of the full model on the same questions; None where the latter has none.

    The interval is log-normal with the variance (b + c) / (n₁ n₂), for b and c questions that only one of them has
    right and n₁ and n₂ right answers. Half a question is added to each cell of the fourfold table, so that the interval
    has a width where no answer differs.
    """
    mine, plain = sum(method), sum(full)
    if not plain:
        return None
    apart = sum(a != b for a, b in zip(full, method, strict=True))
    middle = (mine + 1) / (plain + 1)
    factor = math.exp(Z * math.sqrt((apart + 1) / ((mine + 1) * (plain + 1))))
    # The added halves draw the interval inwards; at the ends of the scale it must still hold the estimate.
    return Interval(mine / plain, min(middle / factor, mine / plain), max(middle * factor, mine / plain))
