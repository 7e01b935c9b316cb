"""The curves of the report: accuracy against tokens, and against time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from winnow.bench.charts import Curve, Figure, Mark, Scale, chart, key
from winnow.bench.report_data import NATIVE, Report
from winnow.bench.summary import Result
from winnow.bench.svg import svg

WIDE, NARROW, SMALL = (880, 500), (360, 340), (320, 230)
Across = Callable[[Result], float | None]


def by_tokens(row: Result) -> float | None:
    return row.layer_tokens


def curves(report: Report, across: Across) -> list[Curve]:
    """One for each label: methods first, by name, then baselines. The full model is a level, not a curve."""
    groups: dict[tuple[bool, str], list[Result]] = {}
    for row in report.rows:
        if row.usable and not row.is_full and across(row) is not None:
            groups.setdefault((row.cell.kind != "method", row.cell.label), []).append(row)
    found, numbers = [], {False: 0, True: 0}
    for (quiet, label), rows in sorted(groups.items()):
        marks = [_mark(row, across) for row in sorted(rows, key=lambda r: across(r) or 0.0)]
        found.append(Curve(label, tuple(marks), numbers[quiet], quiet))
        numbers[quiet] += 1
    return found


def _mark(row: Result, across: Across) -> Mark:
    right, x = row.accuracy, across(row) or 0.0
    y, low, high = 100 * right.value, 100 * right.low, 100 * right.high
    note = f"{row.name}: {y:.1f} % right ({low:.1f} – {high:.1f}), {x:.4g} across"
    return Mark(x, y, low, high, note)


def scale(report: Report, found: list[Curve], title: str) -> Scale:
    """Axes with the full model's accuracy drawn across."""
    full, level = report.full, None
    if full is not None and full.usable:
        level = 100 * full.accuracy.value, f"full\n{100 * full.accuracy.value:.1f}"
    return Scale.around(title, found, level)


def main_chart(report: Report, across: Across, title: str) -> Figure:
    """The chart of all methods in its wide form."""
    found = curves(report, across)
    return chart(found, scale(report, found, title), WIDE, aside=across is by_tokens)


def plot(report: Report, across: Across, title: str, name: str, prefix: str) -> dict[str, Any] | None:
    """The chart of all methods in a wide and a narrow form, a legend, and a small chart of each among the baselines.

    Drawings are SVG; `prefix` is that of their ids. None where there is nothing to draw.
    """
    found = curves(report, across)
    if not found:
        return None
    axes, aside = scale(report, found, title), across is by_tokens
    about = f"{name}: right answers against {title}, a curve for each method"
    wide = svg(chart(found, axes, WIDE, aside=aside), f"{prefix}-w", about, found, "chart wide")
    narrow = chart(found, axes, NARROW, labels=False, aside=aside)
    quiet = [curve for curve in found if curve.quiet and curve.name != NATIVE]
    each = []
    for i, curve in enumerate(found):
        if not curve.quiet:
            shown = [*quiet, curve]
            drawn = chart(shown, axes, SMALL, labels=False, band=True)
            each.append((curve.name, svg(drawn, f"{prefix}-{i}", f"{curve.name} among the baselines", shown)))
    keys = [(curve.name, svg(key(curve), f"{prefix}-k{i}", class_="key")) for i, curve in enumerate(found)]
    charts = [wide, svg(narrow, f"{prefix}-n", about, found, "chart narrow")]
    return {"charts": charts, "keys": keys, "each": each}
