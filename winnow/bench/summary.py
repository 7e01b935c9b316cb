"""The results of a run, one for each cell, and the tables that `winnow bench` and `winnow speed` print."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from winnow.bench.intervals import Interval, Paired, Rate, paired, rate, retained, shares
from winnow.bench.plans import FULL_JOB
from winnow.bench.schema import Answer, Cell
from winnow.bench.speed import Line
from winnow.bench.store import Store

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Result:
    """One cell. What the store does not say is None.

    Attributes:
        accuracy: over all questions that were answered, odd answers counted as wrong.
        change: against the full model on the same questions; None for the full model itself.
        retained: accuracy over the full model's on the same questions, with a paired interval; likewise.
        agreement: share of answers that are the full model's.
        recall: evidence recall, mean over questions that have evidence.
        kept: content tokens left of a picture, mean.
        layer_tokens: tokens of the prompt that a layer of the LM reads, mean.
        flops, kv: means, as shares of the full model's.
        kv_bytes: of the cache after prefill, mean.
        by_type: (right, asked) for each question type.
        odd: answers by status, other than `ok`.
    """

    cell: Cell
    accuracy: Rate
    change: Paired | None
    retained: Interval | None
    agreement: float | None
    recall: float | None
    kept: float | None
    layer_tokens: float | None
    flops: float | None
    kv: float | None
    kv_bytes: float | None
    by_type: dict[str, tuple[int, int]]
    odd: dict[str, int]

    @property
    def asked(self) -> int:
        """Questions that were answered; errors are not among them, empty answers are."""
        return self.accuracy.n

    @property
    def usable(self) -> bool:
        """Whether anything may be concluded from its answers."""
        return self.cell.status != "mismatch" and self.asked > 0

    @property
    def is_full(self) -> bool:
        return self.cell.plan == FULL_JOB.key

    @property
    def name(self) -> str:
        return f"{self.cell.label} {self.cell.budget}".strip()

    def as_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        del found["cell"]["id"], found["cell"]["run"]
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


def summarise(store: Store, run: str) -> list[Result]:
    """The cells of a run, the full model first."""
    answers = {cell: store.answers(cell.id) for cell in store.cells(run)}
    full = next((own for cell, own in answers.items() if cell.plan == FULL_JOB.key), [])
    truth = {a.question: a.correct for a in full if _answered(a)}
    rows = [_result(cell, own, truth) for cell, own in answers.items()]
    return sorted(rows, key=lambda row: not row.is_full)


def _answered(answer: Answer) -> bool:
    return not answer.status.startswith("error:")


def _result(cell: Cell, answers: Sequence[Answer], full: dict[str, bool]) -> Result:
    own = [a for a in answers if _answered(a)]
    pairs = [(full[a.question], a.correct) for a in own if a.question in full]
    plain, mine = [a for a, _ in pairs], [b for _, b in pairs]
    compared = cell.plan != FULL_JOB.key
    by_type: dict[str, tuple[int, int]] = {}
    for a in own:
        right, asked = by_type.get(a.type, (0, 0))
        by_type[a.type] = right + a.correct, asked + 1
    flops, flops_full, kv, kv_full = (
        sum(getattr(a, name) or 0 for a in own) for name in ("flops", "flops_full", "kv_bytes", "kv_bytes_full")
    )
    return Result(
        cell=cell,
        accuracy=rate(sum(a.correct for a in own), len(own)),
        change=paired(plain, mine) if compared else None,
        retained=retained(plain, mine) if compared else None,
        agreement=shares(None if a.agrees is None else float(a.agrees) for a in own),
        recall=shares(a.evidence_recall for a in own),
        kept=shares(a.kept for a in own),
        layer_tokens=shares(a.layer_tokens for a in own),
        flops=flops / flops_full if flops_full else None,
        kv=kv / kv_full if kv_full else None,
        kv_bytes=shares(a.kv_bytes for a in own),
        by_type=by_type,
        odd=dict(sorted(Counter(a.status for a in answers if a.status != "ok").items())),
    )


def accuracy_table(rows: Sequence[Result]) -> Table:
    """Columns and rows for people."""
    columns = ("cell", "keep", "accuracy [95 %]", "against full [95 %]", "same answer", "evidence read",
               "tokens per layer", "FLOPs", "KV", "notes")  # fmt: skip
    return columns, [_line(row) for row in rows]


def _line(row: Result) -> tuple[str, ...]:
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
