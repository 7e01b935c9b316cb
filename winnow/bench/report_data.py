"""What the report says of a run: one `Row` for each cell, made from the answers of a run and the times of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from winnow.bench.meters import Median, efficiency, median, shares
from winnow.bench.report_stats import Interval, retained
from winnow.bench.schema import Answer, Cell, Question, Run, Timing
from winnow.bench.store import Store
from winnow.bench.summary import Summary, summarise

FULL = "full"
NATIVE = "native-M"  # the model that is fed M embeddings: what cannot be beaten
FIRST = "first"  # the phase that is compared: from the pixels to the first token
RAGGED = "ragged "  # before the phases of a batch of unequal questions
SAME = ("weights", "configuration", "code", "dtype", "attention")  # what times and answers must share to be joined

Case = tuple[bool, int]  # whether the questions of a batch are of unequal lengths, and how many they are


@dataclass(frozen=True)
class Row:
    """One cell. What the store does not say is None.

    Attributes:
        about: the figures that `winnow bench` prints too.
        retained: accuracy over that of the full model on the same questions, with a paired interval.
        kept: content tokens left of a picture, mean.
        kv_bytes: of the cache after prefill, mean.
        by_type: (right, asked) for each question type.
        spent: by phase and case, milliseconds of each repeat.
    """

    about: Summary
    retained: Interval | None = None
    kept: float | None = None
    kv_bytes: float | None = None
    by_type: dict[str, tuple[int, int]] = field(default_factory=dict)
    spent: dict[tuple[str, Case], dict[int, float]] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        return self.about.cell

    @property
    def asked(self) -> int:
        """Questions that were answered; errors are not among them, empty answers are."""
        return self.about.accuracy.n

    @property
    def usable(self) -> bool:
        """Whether anything may be concluded from its answers."""
        return self.cell.status != "mismatch" and self.asked > 0

    @property
    def name(self) -> str:
        return f"{self.cell.label} {self.cell.budget}".strip()


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        speed: the run that the times come from, if there is one of this model.
        rows: the full model, methods by name, then baselines; within them most tokens first. No order of merit.
        types: question types with the number of questions of each, by name.
        cases: batches that were timed, those of equal questions first.
        gate: why no speed-up may be shown; empty when nothing forbids it.
    """

    run: Run
    speed: Run | None
    rows: tuple[Row, ...]
    questions: dict[str, Question]
    types: dict[str, int]
    cases: tuple[Case, ...]
    gate: str

    @property
    def full(self) -> Row | None:
        return next((row for row in self.rows if is_full(row.cell)), None)

    @property
    def methods(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.cell.kind == "method")

    def time(self, row: Row | None) -> dict[int, float]:
        """Milliseconds to the first token in the smallest batch, by repeat; empty where it was not timed."""
        return row.spent.get((FIRST, self.cases[0]), {}) if row is not None and self.cases else {}

    def median(self, row: Row) -> Median | None:
        found = self.time(row)
        return median(list(found.values())) if found else None

    def took(self, row: Row) -> float | None:
        """Median milliseconds to the first token."""
        found = self.median(row)
        return None if found is None else found.value

    def speedup(self, row: Row) -> float | None:
        """How many times faster than the full model, as the median over rounds."""
        mine, plain = self.time(row), self.time(self.full)
        both = sorted(mine.keys() & plain.keys())
        return None if self.gate or not both else median([plain[i] / mine[i] for i in both]).value

    def efficiency(self, row: Row) -> float | None:
        """(t_full − t_method) / (t_full − t_native-M) at the same budget, as the median over rounds."""
        native = next((r for r in self.rows if r.cell.label == NATIVE and r.cell.budget == row.cell.budget), None)
        mine, plain, limit = self.time(row), self.time(self.full), self.time(native)
        both = sorted(mine.keys() & plain.keys() & limit.keys())
        if self.gate or not both or any(plain[i] == limit[i] for i in both):
            return None
        f, m, n = ([times[i] for i in both] for times in (plain, mine, limit))
        return efficiency(f, m, n).value if median(f).value > median(n).value else None


def is_full(cell: Cell) -> bool:
    return cell.kind == "baseline" and cell.label == FULL


def reports(store: Store) -> list[Report]:
    """Each run with answers, oldest first, with the newest times of the same model; else the newest run of times."""
    runs = store.runs()
    timed = [run for run in runs if store.timings(run.key)]
    answered = [run for run in runs if any(store.answers(cell.id) for cell in store.cells(run.key))]
    joined = [(run, next((s for s in reversed(timed) if _alike(run, s)), None)) for run in answered]
    return [_report(store, run, speed) for run, speed in joined or [(s, s) for s in timed[-1:]]]


def _alike(run: Run, speed: Run) -> bool:
    return all(run.settings.get(name) == speed.settings.get(name) for name in SAME)


def _report(store: Store, run: Run, speed: Run | None) -> Report:
    about = summarise(store, run.key)
    timings = store.timings(speed.key) if speed else []
    if speed and speed.key != run.key:
        plans = {one.cell.plan for one in about}
        about += [one for one in summarise(store, speed.key) if one.cell.plan not in plans]
    full = next((one.cell for one in about if is_full(one.cell)), None)
    plain = {a.question: a.correct for a in _answers(store, full)} if full else {}
    rows = [_row(one, _answers(store, one.cell), plain, timings) for one in about]
    questions = {q.question: q for q in store.questions(run.key)}
    return Report(
        run,
        speed,
        tuple(sorted(rows, key=_order)),
        questions,
        dict(sorted(Counter(q.type for q in questions.values()).items())),
        tuple(sorted({(t.phase.startswith(RAGGED), t.batch) for t in timings})),
        gate(speed) if speed else "",
    )


def _answers(store: Store, cell: Cell) -> list[Answer]:
    """Those that are no errors."""
    return [a for a in store.answers(cell.id) if not a.status.startswith("error:")]


def gate(speed: Run) -> str:
    """Why the speed-ups of a run must not be shown: what it says of its correctness checks and of the machine."""
    if speed.environment.get("correctness", "green") != "green":
        return "its correctness checks were red"
    if busy := speed.environment.get("busy"):
        return f"the machine was busy ({busy})"
    return ""


def _order(row: Row) -> tuple[int, str, float, str]:
    cell = row.cell
    rank = 0 if is_full(cell) else 1 if cell.kind == "method" else 2
    return rank, cell.label, -(cell.keep or row.kept or 0), cell.plan


def _row(about: Summary, answers: Sequence[Answer], plain: dict[str, bool], timings: Sequence[Timing]) -> Row:
    pairs = [(plain[a.question], a.correct) for a in answers if a.question in plain]
    by_type: dict[str, tuple[int, int]] = {}
    for a in answers:
        right, asked = by_type.get(a.type, (0, 0))
        by_type[a.type] = (right + a.correct, asked + 1)
    spent: dict[tuple[str, Case], dict[int, float]] = {}
    for t in timings:
        if t.plan == about.cell.plan:
            case = t.phase.startswith(RAGGED), t.batch
            spent.setdefault((t.phase.removeprefix(RAGGED), case), {})[t.repeat] = t.value_ms
    return Row(
        about,
        None if is_full(about.cell) else retained([full for full, _ in pairs], [mine for _, mine in pairs]),
        shares(a.kept for a in answers),
        shares(a.kv_bytes for a in answers),
        by_type,
        spent,
    )
