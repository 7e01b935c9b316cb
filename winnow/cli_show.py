"""What the command line prints for people; `--json` prints the same facts for programs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from winnow.core.shown import number

PHASE_NAMES = {
    "encoder": "vision encoder",
    "projector": "projector",
    "select": "selection",
    "prefill": "prefill (LM)",
    "token": "each later token",
    "total": "end to end",
}


def console() -> Console:
    """As wide as the terminal; wide enough not to cut anything where a file or a program reads."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(highlight=False, width=None if terminal else 200)


def listing(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table, whose first column is never cut."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console().print(table)


def comparison(result: dict[str, Any]) -> None:
    """The answers and costs of `winnow run`: one column without compression, one for each plan."""
    out = console()
    truth = f"   right answer: {result['truth']}" if result["truth"] else ""
    rest = f"  {result['question']}{truth}   model: {result['model']} ({result['ran_on']})"
    out.print(f"[bold]{escape(result['picture'])}[/]{escape(rest)}")
    if "video" in result:
        out.print(escape(f"video: {result['video']['says']}"), soft_wrap=True)
    columns = [("none", result["plain"]), *((m["method"], m) for m in result["methods"])]
    table = Table("compression", *(escape(name) for name, _ in columns), box=None, pad_edge=False, header_style="bold")
    for label, cells in _rows([column for _, column in columns]):
        table.add_row(label, *(escape(cell) for cell in cells))
    out.print(table)
    if "note" in result:
        out.print(escape(f"note: {result['note']}"), soft_wrap=True)
    for method in result["methods"]:
        steps = "; ".join(f"{p['point']} {p['from']} → {p['to']}" for p in method["points"])
        smaller = method["kv_bytes"] < result["plain"]["kv_bytes"]
        steps = steps or ("the cache alone is smaller" if smaller else "nothing was dropped")
        out.print(escape(f"{method['method']}: {steps}"))
        if "entered" in method:
            out.print(escape(f"{method['method']}: {method['entered']['says']}"), soft_wrap=True)
        if "overlay" in method:
            out.print(escape(f"  kept tokens drawn in {method['overlay']}"), soft_wrap=True)


def _rows(columns: list[dict[str, Any]]) -> Iterable[tuple[str, list[str]]]:
    full = columns[0]
    yield "answer", [c["answer"] or "(empty)" for c in columns]
    yield "visual tokens left", [str(c["tokens"]["visual"]) for c in columns]
    yield "tokens per LM layer (mean)", [f"{c['tokens']['mean']:.1f}" for c in columns]
    yield "prefill", [f"{number(c['flops'], 'FLOP')} ({c['flops'] / full['flops']:.0%})" for c in columns]
    yield "KV cache", [f"{number(c['kv_bytes'], 'B')} ({c['kv_bytes'] / full['kv_bytes']:.0%})" for c in columns]
    if any("evidence_recall" in c for c in columns):
        yield "evidence kept", ["100%", *(f"{c['evidence_recall']:.0%}" for c in columns[1:])]
    for phase, name in PHASE_NAMES.items():
        yield f"{name}, ms", ["–" if c["ms"][phase] is None else f"{c['ms'][phase]:.2f}" for c in columns]


def checks(results: Iterable[Any]) -> None:
    """The checks of `winnow doctor`."""
    out = console()
    for check in results:
        mark = "[green]ok[/]  " if check.ok else "[red]FAIL[/]"
        out.print(f"{mark} {escape(check.name)}  {escape(check.detail)}", soft_wrap=True)
