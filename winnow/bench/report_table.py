"""The tables of the report: the headline, accuracy by question type, and time by phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from winnow.bench.meters import Rate, median
from winnow.bench.report_data import Case, Report, Row
from winnow.bench.report_markup import Markup, el, join
from winnow.bench.report_stats import Interval

NONE = "–"
FEW = 10  # questions of a type below which its accuracy says little
STEPS = ((-0.3, "h-3"), (-0.15, "h-2"), (-0.05, "h-1"), (0.05, "h0"), (0.15, "h1"), (0.3, "h2"))
PHASES = {
    "encoder": "encoder", "projector": "projector", "select": "selection", "prefill": "LM prefill",
    "first": "pixels to first token", "token": "each later token", "total": "pixels to last token",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column of the headline table: what it is, what it sorts by, and what it shows."""

    title: str
    about: str
    value: Callable[[Row], float | str | None]
    shown: Callable[[Row], object]


def percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}"


def _interval(found: Interval | Rate | None) -> object:
    if found is None:
        return NONE
    return join([percent(found.value), el("small", f"{percent(found.low)} – {percent(found.high)}")], " ")


def _spent(times: dict[int, float] | None) -> object:
    """Median milliseconds, and the quartiles."""
    if not times:
        return NONE
    found = median(list(times.values()))
    return join([f"{found.value:.4g}", el("small", f"{found.q1:.4g} – {found.q3:.4g}")], " ")


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:,.{digits}f}".replace(",", "\u202f").removesuffix(".0")


def _share(get: Callable[[Row], float | None]) -> tuple[Callable, Callable]:
    return get, lambda row: percent(get(row))


def _columns(report: Report) -> list[Column]:
    columns = [
        Column("accuracy %", "share of right answers, with its 95 % interval",
               lambda r: r.about.accuracy.value, lambda r: _interval(r.about.accuracy)),
        Column("retained %", "accuracy over the full model's on the same questions, with a paired 95 % interval",
               lambda r: r.retained.value if r.retained else None, lambda r: _interval(r.retained)),
        Column("same answer %", "answers equal to the full model's, right or wrong",
               *_share(lambda r: r.about.agreement)),
        Column("evidence recall %", "share of the evidence's tokens that a layer of the LM reads, mean over layers",
               *_share(lambda r: r.about.recall)),
        Column("tokens kept", "content tokens of a picture after the last step, mean",
               lambda r: r.kept, lambda r: _number(r.kept)),
        Column("tokens per layer", "prompt tokens that a layer of the LM read, mean over layers and questions",
               lambda r: r.about.layer_tokens, lambda r: _number(r.about.layer_tokens)),
        Column("FLOPs %", "of the LM's prefill, against the full model", *_share(lambda r: r.about.flops)),
        Column("KV %", "bytes of the cache after prefill, against the full model", *_share(lambda r: r.about.kv)),
    ]  # fmt: skip
    if any(report.time(row) for row in report.rows):
        columns.append(
            Column("first token ms", f"from the pixels, {case_name(report.cases[0])}: median and quartiles",
                   report.took, lambda r: _spent(report.time(r)))
        )  # fmt: skip
        if not report.gate:
            columns += [
                Column("speed-up ×", "time of the full model over this one",
                       report.speedup, lambda r: _number(report.speedup(r), 2)),
                Column("efficiency %", "time saved, against what the model saves when it is given as many tokens",
                       *_share(report.efficiency)),
            ]  # fmt: skip
    return columns


def headline(report: Report, ident: str) -> Markup:
    """All cells; every column sorts on a press of its heading."""
    columns = _columns(report)
    heads = [_head("method", "a method's slug, or a baseline", 0, text=True), _head("budget", "as it was given", 1)]
    heads += [_head(column.title, column.about, i) for i, column in enumerate(columns, 2)]
    body = []
    for row in report.rows:
        if row.asked or row.cell.status != "ok":
            body.append(_line(row, columns))
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *body), class_="headline")
    said = [
        "All cells, methods by name. Small figures are 95 % intervals; those of times are quartiles. ",
        el("span", "Press a heading to sort.", class_="screen"),
    ]
    return captioned(table, ident, *said)


def captioned(table: Markup, ident: str, *said: object) -> Markup:
    """A table that scrolls sideways in its own frame, which the keyboard can reach, and what it shows."""
    frame = el("div", table, class_="scroll", tabindex=0, role="region", aria_labelledby=ident)
    return frame + el("p", *said, class_="caption", id=ident)


def _head(title: str, about: str, column: int, text: bool = False) -> Markup:
    return el("th", el("button", title, type="button", data_column=column, data_text=text or None, title=about),
              scope="col", title=about)  # fmt: skip


def _named(label: str, **attributes: object) -> Markup:
    """The heading of a line; only a long plan may be broken over several."""
    return el("th", label, scope="row", class_="long" if len(label) > 24 else None, **attributes)


def _line(row: Row, columns: list[Column]) -> Markup:
    cell = row.cell
    name = [_named(cell.label, data_v=cell.label)]
    name.append(el("td", cell.budget or NONE, data_v=cell.keep if cell.keep is not None else row.kept))
    about = {"data_budget": cell.budget, "data_kind": cell.kind, "class_": cell.kind}
    if not row.usable:
        why = {"mismatch": "its answers differ from those of model.generate, so they are not used"}
        reason = why.get(cell.status, cell.status) + (f" ({cell.note})" if cell.note else "")
        return el("tr", *name, el("td", f"not measured: {reason}", colspan=len(columns), class_="void"), **about)
    return el("tr", *name, *(el("td", c.shown(row), data_v=c.value(row)) for c in columns), **about)


def heat(report: Report, budget: str, ident: str) -> Markup:
    """Accuracy by question type of the cells at one budget; the colour is the difference from the full model."""
    plain = report.full.by_type if report.full else {}
    heads = [el("th", "method", scope="col")]
    heads += [el("th", el("span", kind), el("small", f"{n} asked"), scope="col") for kind, n in report.types.items()]
    lines = []
    for row in report.rows:
        if row.usable and row.cell.budget in (budget, ""):
            cells = [_heat_cell(row.by_type.get(kind), plain.get(kind)) for kind in report.types]
            lines.append(el("tr", _named(row.cell.label), *cells, class_=row.cell.kind))
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *lines), class_="heat")
    return captioned(table, ident, f"Right answers in % at budget {budget}" if budget else "Right answers in %")


def _heat_cell(mine: tuple[int, int] | None, plain: tuple[int, int] | None) -> Markup:
    if not mine:
        return el("td", NONE)
    right, asked = mine
    few = " few" if asked < FEW else ""
    text = percent(right / asked, 0)
    if not plain:
        return el("td", text, class_=f"h0{few}", title=f"{right} of {asked}")
    change = right / asked - plain[0] / plain[1]
    about = f"{right} of {asked}; {100 * change:+.0f} points from the full model"
    return el("td", text, class_=step(change) + few, title=about)


def step(change: float) -> str:
    """The class of a difference in accuracy: h-3 … h3."""
    return next((name for most, name in STEPS if change < most), "h3")


def case_name(case: Case) -> str:
    ragged, size = case
    return f"{size} questions of unequal lengths" if ragged else f"batch {size}"


def phases(report: Report, case: Case, ident: str) -> Markup:
    """Median milliseconds of each phase in one batch, with quartiles."""
    found = {phase for row in report.rows for phase, own in row.spent if own == case}
    names = [name for name in PHASES if name in found] + sorted(found - set(PHASES))
    heads = [el("th", "method", scope="col"), el("th", "budget", scope="col")]
    heads += [el("th", PHASES.get(name, name), scope="col") for name in names]
    lines = []
    for row in report.rows:
        if any(own == case for _, own in row.spent):
            cells = [el("td", _spent(row.spent.get((name, case)))) for name in names]
            lines.append(
                el("tr", _named(row.cell.label), el("td", row.cell.budget or NONE), *cells, class_=row.cell.kind)
            )
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *lines))
    return captioned(table, ident, f"Milliseconds, {case_name(case)}: median, and quartiles in small")
