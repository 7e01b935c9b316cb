"""The report as one self-contained HTML page: styles, script, charts and pictures are inside."""

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

from winnow._version import __version__
from winnow.bench import report_table, report_words
from winnow.bench.charts import DARK, LIGHT
from winnow.bench.report_curves import by_tokens, plot
from winnow.bench.report_data import Report
from winnow.bench.report_pictures import Album, chosen_budget, gallery, odd_shapes, shots
from winnow.bench.schema import Run
from winnow.bench.store import Store
from winnow.core.errors import WinnowError


def page(store: Store, reports: Sequence[Report], folder: Path) -> str:
    """The whole document.

    Args:
        reports: of the runs to show, one after the other.
        folder: where the pictures of a data file lie.
    """
    script = _asset("report.js")
    return _template().render(
        title=f"winnow report: {store.path.name}",
        store=store.path.name,
        version=__version__,
        policy=_policy(script),
        style=colors() + _asset("report.css"),
        script=script,
        runs=[_run(store, report, folder, f"r{i}", len(reports) > 1) for i, report in enumerate(reports, 1)],
        table=report_table,
        words=report_words,
    )


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise WinnowError(
            "The report needs jinja2, which is not installed: pip install 'tokenwinnow[bench]'."
        ) from None
    # Everything is escaped but what a template marks as safe: answers, file names and questions may contain anything.
    made = Environment(
        loader=PackageLoader("winnow.bench"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, extensions=["jinja2.ext.do"],
    )  # fmt: skip
    return made.get_template("report.html")


def _asset(name: str) -> str:
    return (files("winnow") / "bench" / "templates" / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """Nothing is fetched, and no script runs but the page's own, whatever a question or an answer contains."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )


def colors() -> str:
    """The inks of the charts as custom properties, for light and dark."""
    light, dark = (";".join(f"--{ink}:{color}" for ink, color in palette.items()) for palette in (LIGHT, DARK))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _run(store: Store, report: Report, folder: Path, ident: str, several: bool) -> dict[str, Any]:
    """What the template shows of a run."""
    album = Album(folder, set())
    time_title = ""
    if report.cases:
        time_title = f"milliseconds to the first token, {report_table.case_name(report.cases[0])} (median)"
    run = report.run
    when = [str(run.settings[name]) for name in ("device", "dtype") if run.settings.get(name)]
    shown = {
        "id": ident,
        "when": [*when, *([f"run {run.key[:12]}"] if several else []), run.created[:10]],
        "report": report,
        "title": _title(report),
        "facts": _facts(report),
        "tokens": plot(report, by_tokens, report_words.TOKENS, "Accuracy and tokens", f"{ident}-t"),
        "time": None if report.gate else plot(report, report.took, time_title, "Accuracy and time", f"{ident}-s"),
        "gallery": gallery(store, report, album),
        "budget": chosen_budget(report),
        "heats": list(dict.fromkeys(row.cell.budget for row in report.methods if row.cell.budget)) or [""],
        "environments": _environments(report),
    }
    odd = any(odd_shapes(report, shots(store, row, report), album) for row in report.methods[:1])
    return shown | {"album": album, "odd_shapes": odd}


def _title(report: Report) -> str:
    model = str(report.run.settings.get("model", "a model"))
    return model if "/" in model else model[:1].upper() + model[1:]  # a path or a Hub id is not a word


def _facts(report: Report) -> list[tuple[str, str]]:
    """The run in a few figures, each with what it counts."""
    full = report.full
    budgets = {row.cell.budget for row in report.methods if row.cell.budget}
    names = {row.cell.label for row in report.methods}
    facts = [
        (f"{len(names)}", "method" if len(names) == 1 else "methods"),
        (f"{len(budgets)}", "budget" if len(budgets) == 1 else "budgets"),
        (f"{len(report.questions):,}".replace(",", "\u202f"), "questions"),
    ]
    if full and full.usable:
        right = full.accuracy
        about = f"right without compression ({100 * right.low:.1f}\u2009–\u2009{100 * right.high:.1f})"
        facts.append((f"{100 * right.value:.1f}\u202f%", about))
        facts.append((f"{full.layer_tokens or 0:.0f}", "prompt tokens without compression, mean"))
    return facts


def _environments(report: Report) -> list[dict[str, Any]]:
    """What the answers, and the times where they are of another run, were made with and on."""
    found = [_environment("", report.run, command(report))]
    if report.speed is not None and report.speed.key != report.run.key:
        said = str(report.speed.environment.get("command", ""))
        found.append(_environment("The times", report.speed, said))
    return found


def _environment(title: str, run: Run, said: str) -> dict[str, Any]:
    lines = textwrap.fill(said, 88, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    rows = [
        (key.replace("_", " "), value)
        for part in (run.settings, run.environment)
        for key, value in _flat(part)
        if key != "command"
    ]
    return {"title": title, "run": run, "command": lines, "rows": rows}


def command(report: Report) -> str:
    """The command of a run; where it was not recorded, one that asks for the same cells of the same questions."""
    if recorded := report.run.environment.get("command"):
        return str(recorded)
    settings, task = report.run.settings, report.run.settings.get("task")
    task = task if isinstance(task, dict) else {}
    words = ["winnow", "bench"]
    for method in dict.fromkeys(row.cell.label for row in report.methods):
        words += ["--method", method]
    words += ["--keep", ",".join(report.budgets)]
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
