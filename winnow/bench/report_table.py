"""The figures in the tables of the report: the headline, accuracy by question type, and time by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from winnow.bench.charts import number
from winnow.bench.intervals import Interval, Rate, median
from winnow.bench.report_data import Case, Report
from winnow.bench.summary import Result

NONE = "–"
FEW = 10  # questions of a type below which its accuracy says little
STEPS = ((-0.3, "h-3"), (-0.15, "h-2"), (-0.05, "h-1"), (0.05, "h0"), (0.15, "h1"), (0.3, "h2"))
PHASES = {
    "encoder": "encoder", "projector": "projector", "select": "selection", "prefill": "LM prefill",
    "first": "pixels to first token", "token": "each later token", "total": "pixels to last token",
}  # fmt: skip


class Figure(NamedTuple):
    """What a cell of a table shows, its interval in small, and what a pointer reads on it."""

    text: str
    small: str = ""
    class_: str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Column:
    """A column of the headline table: what it is, what it sorts by, and what it shows."""

    title: str
    about: str
    value: Callable[[Result], float | None]
    shown: Callable[[Result], Figure]


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}"


def _interval(found: Interval | Rate | None) -> Figure:
    if found is None:
        return Figure(NONE)
    return Figure(percent(found.value), f"{percent(found.low)} – {percent(found.high)}")


def spent(times: dict[int, float]) -> Figure:
    """Median milliseconds, and the quartiles."""
    if not times:
        return Figure(NONE)
    found = median(list(times.values()))
    return Figure(f"{found.value:.4g}", f"{found.q1:.4g} – {found.q3:.4g}")


def _share(title: str, about: str, get: Callable[[Result], float | None]) -> Column:
    return Column(title, about, get, lambda row: Figure(percent(get(row))))


def _count(title: str, about: str, get: Callable[[Result], float | None], digits: int = 1) -> Column:
    def shown(row: Result) -> Figure:
        value = get(row)
        return Figure(NONE if value is None else number(round(value, digits)))

    return Column(title, about, get, shown)


def columns(report: Report) -> list[Column]:
    """Those of the headline table; of times only where there are any that may be shown."""
    found = [
        Column("accuracy %", "share of right answers, with its 95 % interval",
               lambda r: r.accuracy.value, lambda r: _interval(r.accuracy)),
        Column("retained %", "accuracy over the full model's on the same questions, with a paired 95 % interval",
               lambda r: r.retained.value if r.retained else None, lambda r: _interval(r.retained)),
        _share("same answer %", "answers equal to the full model's, right or wrong", lambda r: r.agreement),
        _share("evidence recall %", "share of the evidence's tokens that a layer of the LM reads, mean over layers",
               lambda r: r.recall),
        _count("tokens kept", "content tokens of a picture after the last step, mean", lambda r: r.kept),
        _count("tokens per layer", "prompt tokens that a layer of the LM read, mean over layers and questions",
               lambda r: r.layer_tokens),
        _share("FLOPs %", "of the LM's prefill, against the full model", lambda r: r.flops),
        _share("KV %", "bytes of the cache after prefill, against the full model", lambda r: r.kv),
    ]  # fmt: skip
    if any(report.time(row) for row in report.rows):
        found.append(
            Column("first token ms", f"from the pixels, {case_name(report.cases[0])}: median and quartiles",
                   report.took, lambda r: spent(report.time(r)))
        )  # fmt: skip
        if not report.gate:
            about = "time saved, against what the model saves when it is given as many tokens"
            found += [
                _count("speed-up ×", "time of the full model over this one", report.speedup, 2),
                _share("efficiency %", about, report.efficiency),
            ]
    return found


def heat(row: Result, report: Report) -> list[Figure]:
    """Accuracy of a cell by question type; the class is the colour of the difference from the full model."""
    plain = report.full.by_type if report.full else {}
    found = []
    for kind in report.types:
        right, asked = row.by_type.get(kind, (0, 0))
        if not asked:
            found.append(Figure(NONE))
            continue
        change = right / asked - plain[kind][0] / plain[kind][1] if kind in plain else 0.0
        title = f"{right} of {asked}"
        if kind in plain:
            title += f"; {100 * change:+.0f} points from the full model"
        class_ = step(change) + (" few" if asked < FEW else "")
        found.append(Figure(percent(right / asked, 0), class_=class_, title=title))
    return found


def step(change: float) -> str:
    """The class of a difference in accuracy: h-3 … h3."""
    return next((name for most, name in STEPS if change < most), "h3")


def case_name(case: Case) -> str:
    ragged, size = case
    return f"{size} questions of unequal lengths" if ragged else f"batch {size}"


def phases(report: Report, case: Case) -> list[str]:
    """The phases that were timed in one batch, in the order of the data."""
    found = {phase for own in report.spent.values() for phase, other in own if other == case}
    return [name for name in PHASES if name in found] + sorted(found - set(PHASES))
