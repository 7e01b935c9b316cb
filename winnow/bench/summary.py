"""One line for each cell of a run: what `winnow bench` and `winnow speed` print."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from winnow.bench.meters import Paired, Rate, paired, rate, shares
from winnow.bench.plans import FULL_JOB
from winnow.bench.schema import Answer, Cell
from winnow.bench.speed import Line
from winnow.bench.store import Store

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Summary:
    """One cell.

    Attributes:
        accuracy: over all questions that were answered, odd answers counted as wrong.
        change: against the full model on the same questions; None for the full model itself.
        agreement: share of answers that are the full model's.
        recall: evidence recall, mean over questions that have evidence.
        layer_tokens, flops, kv: means; the last two as shares of the full model's.
        odd: answers by status, other than `ok`.
    """

    cell: Cell
    accuracy: Rate
    change: Paired | None
    agreement: float | None
    recall: float | None
    layer_tokens: float | None
    flops: float | None
    kv: float | None
    odd: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        del found["cell"]["id"], found["cell"]["run"]
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


def summarise(store: Store, run: str) -> list[Summary]:
    """The cells of a run, the full model first."""
    cells = store.cells(run)
    full = next((c for c in cells if c.plan == FULL_JOB.key), None)
    truth = {a.question: a.correct for a in store.answers(full.id) if _answered(a)} if full else {}
    rows = [_summary(cell, store.answers(cell.id), truth) for cell in cells]
    return sorted(rows, key=lambda row: row.cell.plan != FULL_JOB.key)


def _answered(answer: Answer) -> bool:
    return not answer.status.startswith("error:")


def _summary(cell: Cell, answers: Sequence[Answer], full: dict[str, bool]) -> Summary:
    own = [a for a in answers if _answered(a)]
    pairs = [a for a in own if a.question in full]
    flops, flops_full = (sum(getattr(a, name) or 0 for a in own) for name in ("flops", "flops_full"))
    kv, kv_full = (sum(getattr(a, name) or 0 for a in own) for name in ("kv_bytes", "kv_bytes_full"))
    return Summary(
        cell=cell,
        accuracy=rate(sum(a.correct for a in own), len(own)),
        change=None
        if cell.plan == FULL_JOB.key
        else paired([full[a.question] for a in pairs], [a.correct for a in pairs]),
        agreement=shares(None if a.agrees is None else float(a.agrees) for a in own),
        recall=shares(a.evidence_recall for a in own),
        layer_tokens=shares(a.layer_tokens for a in own),
        flops=flops / flops_full if flops_full else None,
        kv=kv / kv_full if kv_full else None,
        odd=dict(sorted(Counter(a.status for a in answers if a.status != "ok").items())),
    )


def accuracy_table(rows: Sequence[Summary]) -> Table:
    """Columns and rows for people."""
    columns = ("cell", "keep", "accuracy [95 %]", "against full [95 %]", "same answer", "evidence read",
               "tokens per layer", "FLOPs", "KV", "notes")  # fmt: skip
    return columns, [_line(row) for row in rows]


def _line(row: Summary) -> tuple[str, ...]:
    state = (
        "" if row.cell.status == "ok" else f"{row.cell.status.removeprefix('error:').upper()} {row.cell.note}".strip()
    )
    if not row.accuracy.n:
        return (row.cell.label, row.cell.budget, *("–",) * 7, state)
    odd = ", ".join(f"{n} {status}" for status, n in row.odd.items())
    return (
        row.cell.label, row.cell.budget, str(row.accuracy), "–" if row.change is None else str(row.change),
        _share(row.agreement), _share(row.recall), "–" if row.layer_tokens is None else f"{row.layer_tokens:.1f}",
        _share(row.flops), _share(row.kv), "; ".join(filter(None, (state, odd))),
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def speed_table(lines: Sequence[Line]) -> Table:
    """Columns and rows for people; milliseconds."""
    columns = ("plan", "keep", "batch", "first token [95 %]", "spread", "all tokens", "per token", "encoder",
               "projector", "select", "prefill", "speed-up", "efficiency")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for line in lines:
        phase = {p: f"{line.phases[p]:.2f}" if p in line.phases else "–" for p in columns}
        rows.append((
            line.label, line.budget, f"{line.batch} ragged" if line.ragged else str(line.batch),
            f"{line.first.value:.2f} [{line.first.low:.2f}, {line.first.high:.2f}]", f"{line.first.spread:.0%}",
            f"{line.total.value:.2f}", f"{line.phases['token']:.2f}" if "token" in line.phases else "–",
            phase["encoder"], phase["projector"], phase["select"], phase["prefill"],
            "–" if line.speedup is None else f"{line.speedup.value:.2f}×",
            "–" if line.efficiency is None else f"{line.efficiency.value:.0%}",
        ))  # fmt: skip
    return columns, rows
