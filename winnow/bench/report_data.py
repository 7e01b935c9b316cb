"""What the report says of a run: the results of its cells, joined with the times of another run of the same model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from winnow.bench.intervals import Median, efficiency, median
from winnow.bench.schema import Question, Run
from winnow.bench.store import Store
from winnow.bench.summary import Result, summarise

NATIVE = "native-M"  # the model that is fed M embeddings: what cannot be beaten
FIRST = "first"  # the phase that is compared: from the pixels to the first token
RAGGED = "ragged "  # before the phases of a batch of unequal questions
SAME = ("weights", "configuration", "code", "dtype", "attention")  # what times and answers must share to be joined

Case = tuple[bool, int]  # whether the questions of a batch are of unequal lengths, and how many they are
Spent = dict[tuple[str, Case], dict[int, float]]  # by phase and case, milliseconds of each repeat


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        speed: the run that the times come from, if there is one of this model.
        rows: the full model, methods by name, then baselines; within them most tokens first. No order of merit.
        types: question types with the number of questions of each, by name.
        spent: the times of each plan.
        gate: why no speed-up may be shown; empty when nothing forbids it.
    """

    run: Run
    speed: Run | None
    rows: tuple[Result, ...]
    questions: dict[str, Question]
    types: dict[str, int]
    spent: dict[str, Spent]
    gate: str

    @property
    def full(self) -> Result | None:
        return next((row for row in self.rows if row.is_full), None)

    @property
    def methods(self) -> tuple[Result, ...]:
        return tuple(row for row in self.rows if row.cell.kind == "method")

    @property
    def budgets(self) -> list[str]:
        """As they were given, most tokens first."""
        return list(dict.fromkeys(row.cell.budget for row in self.rows if row.cell.budget))

    @property
    def cases(self) -> list[Case]:
        """Batches that were timed, those of equal questions first."""
        return sorted({case for own in self.spent.values() for _, case in own})

    def times(self, row: Result, phase: str, case: Case) -> dict[int, float]:
        return self.spent.get(row.cell.plan, {}).get((phase, case), {})

    def time(self, row: Result | None) -> dict[int, float]:
        """Milliseconds to the first token in the smallest batch, by repeat; empty where it was not timed."""
        return self.times(row, FIRST, self.cases[0]) if row is not None and self.cases else {}

    def median(self, row: Result) -> Median | None:
        found = self.time(row)
        return median(list(found.values())) if found else None

    def took(self, row: Result) -> float | None:
        """Median milliseconds to the first token."""
        found = self.median(row)
        return None if found is None else found.value

    def speedup(self, row: Result) -> float | None:
        """How many times faster than the full model, as the median over rounds."""
        mine, plain = self.time(row), self.time(self.full)
        both = sorted(mine.keys() & plain.keys())
        return None if self.gate or not both else median([plain[i] / mine[i] for i in both]).value

    def efficiency(self, row: Result) -> float | None:
        """(t_full − t_method) / (t_full − t_native-M) at the same budget, as the median over rounds."""
        native = next((r for r in self.rows if r.cell.label == NATIVE and r.cell.budget == row.cell.budget), None)
        mine, plain, limit = self.time(row), self.time(self.full), self.time(native)
        both = sorted(mine.keys() & plain.keys() & limit.keys())
        if self.gate or not both or any(plain[i] == limit[i] for i in both):
            return None
        f, m, n = ([times[i] for i in both] for times in (plain, mine, limit))
        return efficiency(f, m, n).value if median(f).value > median(n).value else None


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
    rows = summarise(store, run.key)
    spent: dict[str, Spent] = {}
    if speed:
        plans = {row.cell.plan for row in rows}
        rows += [row for row in summarise(store, speed.key) if row.cell.plan not in plans]
        for t in store.timings(speed.key):
            phase = t.phase.removeprefix(RAGGED), (t.phase.startswith(RAGGED), t.batch)
            spent.setdefault(t.plan, {}).setdefault(phase, {})[t.repeat] = t.value_ms
    questions = {q.question: q for q in store.questions(run.key)}
    types = Counter(q.type for q in questions.values())
    rows.sort(key=lambda row: (_rank(row), row.cell.label, -(row.cell.keep or row.kept or 0), row.cell.plan))
    return Report(run, speed, tuple(rows), questions, dict(sorted(types.items())), spent, gate(speed) if speed else "")


def gate(speed: Run) -> str:
    """Why the speed-ups of a run must not be shown: what it says of its correctness checks and of the machine."""
    if speed.environment.get("correctness", "green") != "green":
        return "its correctness checks were red"
    if busy := speed.environment.get("busy"):
        return f"the machine was busy ({busy})"
    return ""


def _rank(row: Result) -> int:
    return 0 if row.is_full else 1 if row.cell.kind == "method" else 2
