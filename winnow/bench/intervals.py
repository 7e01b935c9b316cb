"""Intervals at 95 % in closed form, and medians of times: equal data always give equal figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share of n items, with its Wilson interval."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def rate(hits: int, n: int) -> Rate:
    if n == 0:
        return Rate(math.nan, 0.0, 1.0, 0)
    low, high = _wilson(hits / n, n)
    return Rate(hits / n, low, high, n)


def _wilson(p: float, n: int, z: float = Z) -> tuple[float, float]:
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True)
class Paired:
    """The difference of two accuracies on the same questions (second less first).

    Attributes:
        gained, lost: questions that only the second, or only the first, has right.
    """

    value: float
    low: float
    high: float
    gained: int
    lost: int
    n: int

    def __str__(self) -> str:
        if not self.gained and not self.lost:
            return f"no difference ({self.n} items, [{self.low:+.1%}, {self.high:+.1%}])"
        return f"{self.value:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"


def paired(first: Sequence[bool], second: Sequence[bool], z: float = Z) -> Paired:
    """Difference of paired proportions with Newcombe's square-and-add interval (Stat. Med. 17, 2635: method 10).

    It needs no resampling, and does not collapse to nothing with few items or without any difference.

    Args:
        z: quantile of the normal distribution for another confidence than 95 %; at 0 the interval is the estimate.
    """
    n = len(first)
    if n != len(second):
        raise ValueError(f"{n} and {len(second)} answers are no pairs")
    if n == 0:
        return Paired(math.nan, -1.0, 1.0, 0, 0, 0)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    lost, gained = sum(first) - both, sum(second) - both
    neither = n - both - lost - gained
    p2, p1 = sum(second) / n, sum(first) / n
    (l2, u2), (l1, u1) = _wilson(p2, n, z), _wilson(p1, n, z)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    cross = float(both * neither - lost * gained)
    if cross > 0:
        cross = max(0.0, cross - n / 2)  # the method's continuity correction
    phi = cross / math.sqrt(margins) if margins else 0.0
    down = math.sqrt(max(0.0, (p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2))
    up = math.sqrt(max(0.0, (u2 - p2) ** 2 - 2 * phi * (u2 - p2) * (p1 - l1) + (p1 - l1) ** 2))
    return Paired(p2 - p1, max(-1.0, p2 - p1 - down), min(1.0, p2 - p1 + up), gained, lost, n)


@dataclass(frozen=True)
class Median:
    """A median with its bootstrap interval and its quartiles."""

    value: float
    low: float
    high: float
    q1: float
    q3: float

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.q3 - self.q1) / self.value if self.value else math.inf


def median(values: Sequence[float] | np.ndarray, draws: int = 2000) -> Median:
    """The median of timed repeats; the interval is resampled with a fixed seed."""
    x = np.asarray(values, dtype=float)
    medians = np.median(np.random.default_rng(0).choice(x, (draws, len(x))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    q1, q3 = np.quantile(x, (0.25, 0.75))
    return Median(float(np.median(x)), float(low), float(high), float(q1), float(q3))


def efficiency(full: Sequence[float], method: Sequence[float], native: Sequence[float]) -> Median:
    """(t_full − t_method) / (t_full − t_native): 1 means that the method itself costs nothing.

    Repeats are paired: those of one round ran next to each other.
    """
    f, m, n = (np.asarray(x, dtype=float) for x in (full, method, native))
    return median((f - m) / (f - n))


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


def shares(values: Iterable[float | None]) -> float | None:
    """The mean of what is known."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
