"""Throughput and latencies of a run, with intervals over its rounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from winnow.bench.intervals import Interval, Rate, rate
from winnow.serve.bench.journal import Cell, Group

PERCENTILES = (50, 90, 99)
DRAWS = 1000
T = TypeVar("T")
Percentiles = dict[int, Interval | None]


@dataclass(frozen=True)
class Row:
    """What one plan did at one number of clients, over all rounds.

    Attributes:
        throughput: answers in a second.
        gain: throughput over that of the first plan in the same rounds; None for the first plan itself.
        first, total: milliseconds to the first text and to the end, by percentile; None where there are too few
            requests for it (p99 needs 100).
        prompt, kept, answer: tokens of a request, on average.
        errors: how many requests ended with which error; they are in no other figure.
    """

    clients: int
    plan: str
    rounds: int
    requests: int
    throughput: Interval
    gain: Interval | None
    first: Percentiles
    total: Percentiles
    prompt: float
    kept: float | None
    answer: float
    right: Rate
    errors: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """The same for programs: an interval is [value, low, high], its ends null after a single round."""
        found = asdict(self)
        for name in ("throughput", "gain"):
            found[name] = _listed(found[name])
        for name in ("first", "total"):
            found[name] = {f"p{p}": _listed(own) for p, own in found[name].items()}
        return found


def rows(groups: Sequence[Group], plans: Sequence[str], *, gains: bool = True) -> list[Row]:
    """The figures of a run, by number of clients and plan.

    Args:
        plans: in their order; the first is what the others are compared with.
        gains: whether they are compared.
    """
    found = []
    for clients in sorted({group.clients for group in groups}):
        own = [group.cells for group in groups if group.clients == clients]
        for plan in plans:
            compared = plans[0] if gains and plan != plans[0] else None
            found.append(_row(clients, plan, own, compared))
    return found


def _row(clients: int, plan: str, groups: Sequence[dict[str, Cell]], compared: str | None) -> Row:
    cells = [group[plan] for group in groups]
    good, errors = sum(len(cell.total) for cell in cells), Counter[str]()
    for cell in cells:
        errors.update(cell.errors)
    kept = [cell.kept for cell in cells if cell.kept is not None]
    gain = None
    if compared is not None:
        other = compared
        gain = over_rounds(groups, lambda some: [_speed([g[plan] for g in some]) / _speed([g[other] for g in some])])[0]
    return Row(
        clients=clients,
        plan=plan,
        rounds=len(cells),
        requests=good + errors.total(),
        throughput=over_rounds(cells, lambda some: [_speed(some)])[0],
        gain=gain,
        first=_percentiles([cell.first for cell in cells]),
        total=_percentiles([cell.total for cell in cells]),
        prompt=_mean([cell.prompt for cell in cells], good),
        kept=_mean(kept, good) if kept else None,
        answer=_mean([cell.answer for cell in cells], good),
        right=rate(sum(cell.right for cell in cells), good),
        errors=dict(errors),
    )


def over_rounds(rounds: Sequence[T], figures: Callable[[Sequence[T]], Sequence[float]]) -> list[Interval]:
    """Figures of all rounds together, with the 95 % interval of the same figures of rounds drawn with replacement.

    Rounds are drawn, not requests: what slows one request down slows its neighbours down as well. With few rounds such
    an interval is too narrow, and after a single one it has no ends (NaN).
    """
    values = figures(rounds)
    if len(rounds) < 2:
        return [Interval(value, math.nan, math.nan) for value in values]
    picks = np.random.default_rng(0).integers(len(rounds), size=(DRAWS, len(rounds)))
    drawn = np.asarray([figures([rounds[i] for i in pick]) for pick in picks])
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    return [Interval(*map(float, own)) for own in zip(values, low, high, strict=True)]


def _percentiles(rounds: Sequence[Sequence[float]]) -> Percentiles:
    count = sum(map(len, rounds))
    enough = [p for p in PERCENTILES if count * (100 - p) >= 100]
    filled = [np.asarray(own) for own in rounds if own]

    def figures(some: Sequence[np.ndarray]) -> list[float]:
        return list(np.percentile(np.concatenate(some), enough, method="inverted_cdf"))

    known = dict(zip(enough, over_rounds(filled, figures), strict=True)) if enough else {}
    return {p: known.get(p) for p in PERCENTILES}


def _speed(cells: Sequence[Cell]) -> float:
    return sum(len(cell.total) for cell in cells) / sum(cell.seconds for cell in cells)


def _mean(sums: Sequence[int], count: int) -> float:
    return sum(sums) / count if count else math.nan


def _listed(interval: Any) -> list[float | None] | None:
    return None if interval is None else [None if math.isnan(x) else x for x in interval]
