"""The curves of the report: accuracy against tokens, and against time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from winnow.bench.report_chart import Axis, Curve, Dot, Mark, Shape, Stroke, axis, chart, line_of
from winnow.bench.report_data import FULL, NATIVE, Report, Row
from winnow.bench.report_draw import svg
from winnow.bench.report_markup import Markup, el

WIDE, NARROW, SMALL = (880, 500), (360, 340), (320, 230)
Across = Callable[[Row], float | None]


def by_tokens(row: Row) -> float | None:
    return row.about.layer_tokens


def curves(report: Report, across: Across) -> list[Curve]:
    """One for each label: methods first, by name, then baselines. The full model is a level, not a curve."""
    groups: dict[tuple[bool, str], list[Row]] = {}
    for row in report.rows:
        if row.usable and row.cell.label != FULL and across(row) is not None:
            groups.setdefault((row.cell.kind != "method", row.cell.label), []).append(row)
    found, numbers = [], {False: 0, True: 0}
    for (quiet, label), rows in sorted(groups.items()):
        marks = [_mark(row, across) for row in sorted(rows, key=lambda r: across(r) or 0.0)]
        found.append(Curve(label, tuple(marks), numbers[quiet], quiet))
        numbers[quiet] += 1
    return found


def _mark(row: Row, across: Across) -> Mark:
    right, x = row.about.accuracy, across(row) or 0.0
    y, low, high = 100 * right.value, 100 * right.low, 100 * right.high
    note = f"{row.name}: {y:.1f} % right ({low:.1f} – {high:.1f}), {x:.4g} across"
    return Mark(x, y, low, high, note)


def axes(found: Sequence[Curve], report: Report, title: str) -> tuple[Axis, Axis]:
    """One pair of axes for all charts of a kind, so that they can be compared."""
    marks = [mark for curve in found for mark in curve.marks]
    heights = [h for c in found for m in c.marks for h in ((m.y,) if c.quiet else (m.low, m.high))]
    if (plain := level(report)) is not None:
        heights.append(plain[0])
    return axis(title, [m.x for m in marks]), axis("right answers, %", heights, ends=(0.0, 100.0))


def level(report: Report) -> tuple[float, str] | None:
    """The full model's accuracy, drawn across."""
    full = report.full
    if full is None or not full.usable:
        return None
    return 100 * full.about.accuracy.value, f"full\n{100 * full.about.accuracy.value:.1f}"


def main_shapes(report: Report, across: Across, title: str) -> list[Shape]:
    """The chart of all methods, in its wide form."""
    found = curves(report, across)
    return chart(found, *axes(found, report, title), size=WIDE, level=level(report), aside=across is by_tokens)


def section(report: Report, across: Across, title: str, name: str, unfolded: bool = True) -> Markup:
    """The chart of all methods in a wide and a narrow form, a legend that singles one out, and a chart for each."""
    found = curves(report, across)
    x, y = axes(found, report, title)
    about = f"{name}: right answers against {title}, a curve for each method"
    wide = svg(
        chart(found, x, y, size=WIDE, level=level(report), aside=across is by_tokens), WIDE, about, class_="chart wide"
    )
    narrow = chart(found, x, y, size=NARROW, level=level(report), labels=False, aside=across is by_tokens)
    charts = [wide, svg(narrow, NARROW, about, class_="chart narrow")]
    legend = el("ul", *(el("li", _key(curve)) for curve in found), class_="legend")
    each = el("details", el("summary", "A chart for each method"), _each(report, found, x, y), open=unfolded)
    return el("div", *charts, legend, each, class_="plot")


def _key(curve: Curve) -> Markup:
    """A legend entry: a press singles the curve out."""
    width, size = line_of(curve)
    line = Stroke(((1.0, 7.0), (29.0, 7.0)), curve.ink, width, curve.dash)
    key = svg([line, Dot(15, 7, curve.ink, curve.marker, size=size)], (30, 14), "", class_="key")
    return el("button", key, curve.name, type="button", data_curve=curve.name, aria_pressed="false")


def _each(report: Report, found: Sequence[Curve], x: Axis, y: Axis) -> Markup:
    """A small chart of each method with its interval as a band, among the baselines."""
    quiet = [curve for curve in found if curve.quiet and curve.name != NATIVE]
    panels = []
    for curve in found:
        if not curve.quiet:
            shapes = chart([*quiet, curve], x, y, size=SMALL, level=level(report), labels=False, band=True)
            drawn = svg(shapes, SMALL, f"{curve.name} among the baselines", class_="chart")
            panels.append(el("figure", el("figcaption", curve.name), drawn))
    return el("div", *panels, class_="panels")
