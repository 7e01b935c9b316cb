"""The report as one HTML page that needs nothing from anywhere: styles, script, charts and pictures are in it."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import textwrap
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import winnow
from winnow.bench import report_curves, report_table
from winnow.bench.report_data import Report
from winnow.bench.report_draw import DARK, LIGHT
from winnow.bench.report_markup import Markup, el, join
from winnow.bench.report_pictures import Album, chosen_budget, gallery, odd_shapes, shots
from winnow.bench.report_words import BASELINES, DEFINITIONS, HEAT, INTERVALS, OVERLAYS, TOKENS, notes
from winnow.bench.schema import Run
from winnow.bench.store import Store


def page(store: Store, reports: Sequence[Report], folder: Path) -> str:
    """The whole document.

    Args:
        reports: of the runs to show, one after the other.
        folder: where the pictures of a data file lie.
    """
    style, script = _asset("report.css"), _asset("report.js")
    title = f"winnow report: {store.path.name}"
    shown = [_run(store, report, folder, f"r{i}", len(reports) > 1) for i, report in enumerate(reports, 1)]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Markup(colors() + style)),
    )
    foot = el(
        "footer",
        f"Written by winnow {winnow.__version__} from {store.path.name}. This file asks nothing of any network.",
    )
    body = el("body", el("main", *shown), foot, el("script", Markup(script)))
    return "<!doctype html>\n" + el("html", head, body, lang="en") + "\n"


def _asset(name: str) -> str:
    return (files("winnow") / "bench" / "templates" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Nothing is fetched, and no script runs but the page's own, whatever a question or an answer contains."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def colors() -> str:
    """The inks as custom properties, for light and dark, and the classes that use them."""
    light, dark = (";".join(f"--{ink}:{color}" for ink, color in palette.items()) for palette in (LIGHT, DARK))
    use = "".join(
        f".line.{ink},.hollow.{ink}{{stroke:var(--{ink})}}.fill.{ink},.dot.{ink}{{fill:var(--{ink})}}" for ink in LIGHT
    )
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}{use}\n"


def _run(store: Store, report: Report, folder: Path, ident: str, several: bool) -> Markup:
    album = Album(folder, set())
    sections = [
        ("Accuracy and tokens", _tokens(report)),
        ("Accuracy and time", _time(report)),
        ("All cells", _cells(report, ident)),
        ("What was kept", _kept(store, report, album)),
        ("By question type", _types(report, ident)),
        ("Time by phase", _phases(report, ident)),
        ("How to read this", _reading(report)),
        ("How it was measured", _environment(report)),
    ]
    present = [(f"{ident}-{i}", title, content) for i, (title, content) in enumerate(sections) if content is not None]
    links = el("nav", *(el("a", title, href=f"#{at}") for at, title, _ in present), aria_label="Sections")
    parts = [el("section", el("h2", title, id=at), content) for at, title, content in present]
    return el("article", _header(report, several), links, *parts)


def _header(report: Report, several: bool) -> Markup:
    settings, full = report.run.settings, report.full
    model = str(settings.get("model", "a model"))
    model = model if "/" in model else model[:1].upper() + model[1:]  # a path or a Hub id is not a word
    budgets = {row.cell.budget for row in report.methods if row.cell.budget}
    names = {row.cell.label for row in report.methods}
    facts = [
        (f"{len(names)}", _plural(len(names), "method")),
        (f"{len(budgets)}", _plural(len(budgets), "budget")),
        (f"{len(report.questions):,}".replace(",", "\u202f"), "questions"),
    ]
    if full and full.usable:
        right = full.about.accuracy
        about = f"right without compression ({100 * right.low:.1f}\u2009–\u2009{100 * right.high:.1f})"
        facts.append((f"{100 * right.value:.1f}\u202f%", about))
        facts.append((f"{full.about.layer_tokens or 0:.0f}", "prompt tokens without compression, mean"))
    said = [el("div", el("dt", what), el("dd", value)) for value, what in facts]
    where = " · ".join(str(settings[k]) for k in ("device", "dtype") if settings.get(k))
    run = f" · run {report.run.key[:12]}" if several else ""
    return el(
        "header",
        el("p", "winnow report", class_="kicker"),
        el("h1", f"{model} with fewer tokens"),
        el("p", f"{where}{run} · {report.run.created[:10]}", class_="when"),
        el("dl", *said, class_="facts"),
    )


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"


def _tokens(report: Report) -> Markup | None:
    if not report_curves.curves(report, report_curves.by_tokens):
        return None
    return join(
        [el("p", INTERVALS), report_curves.section(report, report_curves.by_tokens, TOKENS, "Accuracy and tokens")]
    )


def _time(report: Report) -> Markup | None:
    if not report.cases:
        said = "This store has no times of this model with this code. `winnow speed` adds them to the same store."
        return el("p", said, class_="none")
    if report.gate:
        return el("p", f"No speed-up is shown: {report.gate}.", class_="warning")
    if not report_curves.curves(report, report.took):
        return None
    title = f"milliseconds to the first token, {report_table.case_name(report.cases[0])} (median)"
    return report_curves.section(report, report.took, title, "Accuracy and time", unfolded=False)


def _cells(report: Report, ident: str) -> Markup | None:
    if not any(row.asked for row in report.rows):
        return None
    budgets = list(dict.fromkeys(row.cell.budget for row in report.rows if row.cell.budget))
    options = [el("option", "all budgets", value="")]
    options += [el("option", f"budget {budget}", value=budget) for budget in budgets]
    pick = el("label", "Show ", el("select", *options, class_="budget"), class_="filter")
    return el("div", pick, report_table.headline(report, f"{ident}-cells"), class_="cells")


def _kept(store: Store, report: Report, album: Album) -> Markup | None:
    found = gallery(store, report, album)
    if not found:
        return None
    budget = chosen_budget(report)
    said = f"{OVERLAYS} The budget is {budget}." if budget else OVERLAYS
    parts: list[object] = [el("p", said)]
    if album.missing:
        parts.append(el("p", f"{len(album.missing)} pictures were not found under {album.folder}; they are grey.",
                        class_="warning"))  # fmt: skip
    if any(odd_shapes(report, shots(store, row, report), album) for row in report.methods[:1]):
        parts.append(el("p", "Some pictures differ in shape from their grid. If the processor crops or pads them, the "
                        "squares here are drawn as if it had shown the whole picture.", class_="warning"))  # fmt: skip
    return join([*parts, *(el("div", el("h3", name), shown, class_="method") for name, shown in found)])


def _types(report: Report, ident: str) -> Markup | None:
    if len(report.types) < 2:
        return None
    budgets = list(dict.fromkeys(row.cell.budget for row in report.methods if row.cell.budget)) or [""]
    middle = chosen_budget(report)
    marks = [el("span", text, class_=name) for name, text in (
        ("h-3", "−30 and worse"), ("h-2", "−15"), ("h-1", "−5"), ("h0", "about equal"), ("h1", "+5"), ("h2", "+15"),
        ("h3", "+30"))]  # fmt: skip
    tables = []
    for i, budget in enumerate(budgets):
        table = report_table.heat(report, budget, f"{ident}-heat{i}")
        tables.append(
            el("details", el("summary", f"Budget {budget}" if budget else "All"), table, open=budget == middle)
        )
    return join([el("p", HEAT), el("p", *marks, class_="scale"), *tables])


def _phases(report: Report, ident: str) -> Markup | None:
    parts = []
    for i, case in enumerate(report.cases):
        table = report_table.phases(report, case, f"{ident}-phases{i}")
        name = report_table.case_name(case)
        parts.append(el("details", el("summary", name[0].upper() + name[1:]), table, open=i == 0))
    return join(parts) if parts else None


def _reading(report: Report) -> Markup:
    defined = join((join([el("b", term), " ", text]) for term, text in DEFINITIONS.items()), " ")
    labels = {row.cell.label for row in report.rows if row.cell.kind == "baseline"}
    lines = [
        join([el("b", name), " ", text]) for name, text in BASELINES.items() if labels & {name, name.removesuffix("-M")}
    ]
    parts = [el("ul", *(el("li", note) for note in notes(report)), class_="notes"), el("p", defined)]
    if lines:
        parts.append(el("p", "Baselines: ", join(lines, "; "), "."))
    return join(parts)


def _environment(report: Report) -> Markup:
    parts: list[object] = [_settings(report.run, command(report))]
    if not report.run.environment.get("command"):
        parts.insert(0, el("p", "The command was not recorded; this one asks for the same cells and questions."))
    if report.speed is not None and report.speed.key != report.run.key:
        parts += [el("h3", "The times"), _settings(report.speed, str(report.speed.environment.get("command", "")))]
    return join(parts)


def _settings(run: Run, said: str) -> Markup:
    """What a run was made with and on."""
    shown = textwrap.fill(said, 88, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    rows = [
        el("tr", el("th", key.replace("_", " "), scope="row"), el("td", value))
        for part in (run.settings, run.environment)
        for key, value in _flat(part)
        if key != "command"
    ]
    code = el("pre", el("code", shown)) if said else None
    table = el("table", el("tbody", *rows), class_="facts-table")
    return join([code, table, el("p", f"Run {run.key}, begun {run.created}.", class_="when")])


def command(report: Report) -> str:
    """The command of a run; where it was not recorded, one that asks for the same cells of the same questions."""
    if recorded := report.run.environment.get("command"):
        return str(recorded)
    settings, task = report.run.settings, report.run.settings.get("task")
    task = task if isinstance(task, dict) else {}
    methods = dict.fromkeys(row.cell.label for row in report.methods)
    budgets = dict.fromkeys(row.cell.budget for row in report.rows if row.cell.budget)
    words = ["winnow", "bench", "--methods", ",".join(methods), "--keep", ",".join(budgets)]
    words += ["--data", str(task["name"])] if task.get("task") == "data" else []
    words += ["--questions", str(len(report.questions)), "--seed", str(settings.get("seed", 0))]
    return shlex.join(words)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines."""
    found: list[tuple[str, str]] = []
    for key, value in sorted(values.items()):
        name = f"{prefix}{key}"
        if key == "types":
            continue  # the questions of each type are in the table of types
        if isinstance(value, dict):
            found += _flat(value, f"{name} · ")
        elif value not in (None, "", []):
            found.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return found
