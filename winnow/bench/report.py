"""`winnow report`: a store as one HTML page, and its main chart and figures beside it as PNG, CSV and JSON."""

from __future__ import annotations

import csv as csv_writer
import dataclasses
import io
import json as json_writer
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from winnow.bench.charts import png as as_png
from winnow.bench.charts import require
from winnow.bench.report_curves import by_tokens, curves, main_chart
from winnow.bench.report_data import Report, reports
from winnow.bench.report_page import page
from winnow.bench.report_words import TOKENS, notes
from winnow.bench.store import Store
from winnow.bench.summary import Result
from winnow.core.errors import WinnowError

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes a spreadsheet take a cell for a formula


def write_report(
    store_path: str | os.PathLike[str],
    out_html: str | os.PathLike[str],
    *,
    png: bool = True,
    csv: bool = True,
    json: bool = True,
    pictures: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Write the report of all runs of a store that have answers.

    Args:
        store_path: what `winnow bench --store` wrote.
        out_html: the page; its folder is made where it does not exist.
        png, csv, json: also the main chart of each run (`report.png`, or `report-1.png`, … for several), and all
            figures as a table and as JSON, beside the page.
        pictures: folder of the pictures of a data file; default: the store's.

    Returns:
        The files that were written, the page first.

    Raises:
        WinnowError: there is no such store, it has no answers, or what draws the page is not installed.
    """
    target = Path(out_html)
    if target.is_dir() or target.suffix.lower() not in (".html", ".htm"):
        raise WinnowError(f"The report goes into an .html file; got {target}.")
    require()
    with Store(store_path) as store:
        found = reports(store)
        if not found:
            raise WinnowError(f"{store.path} has no answers yet; fill it with `winnow bench --store {store.path}`.")
        html = page(store, found, Path(pictures) if pictures is not None else store.path.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = [_write(target, html.encode())]
    if png:
        written += _charts(found, target)
    if csv:
        written.append(_write(target.with_suffix(".csv"), table(found).encode()))
    if json:
        written.append(_write(target.with_suffix(".json"), figures(found).encode()))
    return written


def _write(path: Path, content: bytes) -> Path:
    """Write the whole file or nothing."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
    return path


def _charts(found: Sequence[Report], target: Path) -> Iterator[Path]:
    for number, report in enumerate(found, 1):
        if curves(report, by_tokens):
            name = target.stem if len(found) == 1 else f"{target.stem}-{number}"
            yield _write(target.with_name(f"{name}.png"), as_png(main_chart(report, by_tokens, TOKENS)))


def table(shown: Sequence[Report]) -> str:
    """One line for each cell. Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    lines = [_figures(report, row) for report in shown for row in report.rows]
    buffer = io.StringIO()
    writer = csv_writer.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in line.items()} for line in lines)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.startswith(FORMULA):
        return "'" + value
    return "" if value is None else value


def figures(shown: Sequence[Report]) -> str:
    """All figures of the page as JSON: for each run its settings, environment, notes, and rows."""
    found = []
    for report in shown:
        rows = [
            _figures(report, row)
            | {"by_type": {kind: {"right": right, "asked": asked} for kind, (right, asked) in row.by_type.items()}}
            for row in report.rows
        ]
        found.append(dataclasses.asdict(report.run) | {"notes": notes(report), "rows": rows})
    return json_writer.dumps({"runs": found}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def answered(report: Report, names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each cell that has answers, the figures of these names."""
    found = [_figures(report, row) for row in report.rows if row.asked]
    return [{name: row[name] for name in names} for row in found]


def _figures(report: Report, row: Result) -> dict[str, Any]:
    """The figures of a cell, shares as numbers from 0 to 1; None where they are unknown or may not be used."""
    cell, time = row.cell, report.median(row)
    found: dict[str, Any] = {
        "run": report.run.key,
        "kind": cell.kind,
        "label": cell.label,
        "budget": cell.budget,
        "plan": cell.plan,
        "status": cell.status,
        "questions": row.asked,
    }
    measured: dict[str, Any] = {}
    for name, interval in (("accuracy", row.accuracy), ("change", row.change), ("retained", row.retained)):
        for end, key in (("value", name), ("low", f"{name}_low"), ("high", f"{name}_high")):
            value = getattr(interval, end, None)
            measured[key] = None if value is None or math.isnan(value) else value
    measured |= {
        "same_answer": row.agreement,
        "evidence_recall": row.recall,
        "tokens_kept": row.kept,
        "layer_tokens": row.layer_tokens,
        "flops_share": row.flops,
        "kv_share": row.kv,
        "kv_bytes": row.kv_bytes,
    }
    if not row.usable:
        measured = dict.fromkeys(measured)
    timed = {
        "first_token_ms": time and time.value,
        "first_token_ms_q1": time and time.q1,
        "first_token_ms_q3": time and time.q3,
        "speedup": report.speedup(row),
        "efficiency": report.efficiency(row),
    }
    return found | measured | timed
