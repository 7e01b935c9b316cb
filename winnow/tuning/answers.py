"""Answers of many plans to the same questions, kept in a store: what is there is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.bench.environment import environment, run_key
from winnow.bench.plans import FULL_JOB, Job
from winnow.bench.requests import Request, batches, one_of_each_picture, request
from winnow.bench.reuse import layout_of, listening
from winnow.bench.runner import bar, refuse_mismatches
from winnow.bench.schema import Cell, Question
from winnow.bench.shared_layers import SharedLayers
from winnow.bench.shared_pictures import SharedPictures
from winnow.bench.store import Store
from winnow.bench.sweep import Outcome, Sweeper
from winnow.bench.tasks import Ask, Task
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.engine.compress import compress


@dataclass(frozen=True)
class Given:
    """What a plan answered.

    Attributes:
        right: by question.
        flops: of the LM's prefill, as a share of the full model's.
        kv_bytes: the most that a question took.
        failed: why it could not be asked; empty where it could.
    """

    right: dict[str, bool]
    flops: float = 1.0
    kv_bytes: int = 0
    failed: str = ""


class Answers:
    """Asks plans, batch by batch, and reads what they answered.

    Args:
        settings: what could change an answer, from `answer_settings`; equal settings share their answers, whatever
            was looked for.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        task: Task,
        store: Store,
        settings: dict[str, Any],
        batch: int,
        progress: bool = False,
    ) -> None:
        self.model, self.processor, self.task, self.store = model, processor, task, store
        self.batch, self.progress = batch, progress
        self.max_new_tokens: int = settings["max_new_tokens"]
        self.run = run_key(settings)
        store.add_run(self.run, settings, environment())
        store.add_questions(
            Question(self.run, a.id, a.type, a.text, a.truth, a.image, a.evidence) for a in task.questions
        )
        self._cells = {FULL_JOB.key: store.add_cell(self.run, FULL_JOB.cell)}
        self._bad: set[str] = set()

    def layout(self) -> Layout:
        """Of the first question that can be asked: what shares of tokens are shares of."""
        first = batches(self.model, self.processor, self._part(self.task.questions[:8]), 1).batches[0][0]
        alone = self._request(first)
        with compress(self.model, Plan(()), processor=self.processor) as handle:
            return layout_of(handle, alone)

    def ask(
        self, plans: Sequence[Plan], questions: Sequence[Ask], *, check: bool = False, say: Callable[[str], None]
    ) -> None:
        """Ask the full model and the plans what they have not answered yet.

        Args:
            check: ask the first batch of each plan through `model.generate` with the pixels too, and compare.

        Raises:
            WinnowError: no question can be asked, or the check failed.
        """
        jobs = [FULL_JOB, *(Job(Cell(p.key, str(p), "method", "", None), p) for p in plans)]
        for job in jobs:
            self._cells.setdefault(job.key, self.store.add_cell(self.run, job.cell))
        done = {job.key: self.store.answered(self._cells[job.key]) for job in jobs}
        lacking = [
            ask for ask in questions if ask.id not in self._bad and any(ask.id not in done[job.key] for job in jobs)
        ]
        if not lacking:
            return
        asked = batches(self.model, self.processor, self._part(lacking), self.batch)
        self._bad |= {ask.id for ask in lacking} - {ask.id for own in asked.batches for ask in own}
        for row in asked.bad:
            say(f"left out: {row}")
        failed: set[str] = set()
        with compress(self.model, Plan(()), processor=self.processor) as handle, SharedLayers(handle) as layers:
            reader = listening(handle, [job.plan for job in jobs])
            pictures = SharedPictures(handle, reader, layers)
            sweeper = Sweeper(handle, self.processor, reader, layers, pictures, self.max_new_tokens)
            content = layout_of(handle, self._request(asked.alike[0][0])).n_content
            windows = pictures.windows(asked, [job.plan for job in jobs], content)
            parts = [sweeper.parts(window, jobs) for window in windows]
            first = [own[0] for own, _ in parts[0]] if check else []
            with bar(sum(len(own) * len(some) for apart in parts for own, some in apart), self.progress) as step:
                for window, apart in zip(windows, parts, strict=True):
                    left = [job.plan for job in jobs if job.key not in failed]
                    each = [self._request(ask) for ask in one_of_each_picture(window)]
                    pictures.encode(left, each, window.rows)
                    for own, some in ((own, some) for batches, some in apart for own in batches if some):
                        self._batch(sweeper, some, own, done, failed, own in first, step)
        self.store.settle(self.run, FULL_JOB.key)
        refuse_mismatches(self.store, self.run)

    def _batch(
        self,
        sweeper: Sweeper,
        jobs: Sequence[Job],
        own: Sequence[Ask],
        done: dict[str, set[str]],
        failed: set[str],
        check: bool,
        step: Callable[[], None],
    ) -> None:
        """Ask each plan that has not failed what it lacks of a batch."""
        requests = [self._request(ask) for ask in own]
        encoded = sweeper.shared(requests)
        for job in jobs:
            want = {ask.id for ask in own} - done[job.key]
            if want and job.key not in failed:
                outcome = sweeper.run(job, self._cells[job.key], requests, encoded, check and job is not FULL_JOB)
                if not self._write(job, outcome, want):
                    failed.add(job.key)
            step()

    def _request(self, ask: Ask) -> Request:
        return request(self.model, self.processor, self.task, ask)

    def _write(self, job: Job, outcome: Outcome, want: set[str]) -> bool:
        """A batch; whether all of it was answered, without which a plan is not asked more."""
        marks: dict[str, Any] = {}
        if outcome.mismatch:
            marks = {"status": "mismatch", "note": f"{outcome.mismatch} has another answer through model.generate"}
        elif outcome.note:
            marks = {"status": next(a.status for a in outcome.answers if a.status != "ok"), "note": outcome.note}
        self.store.add_batch(self._cells[job.key], [a for a in outcome.answers if a.question in want], **marks)
        return not outcome.note

    def given(self, plan: Plan | None) -> Given:
        """What a plan has answered so far; None is the full model."""
        key = FULL_JOB.key if plan is None else plan.key
        answers = self.store.answers(self._cells[key])
        good = [a for a in answers if not a.status.startswith("error:")]
        broken = next((a.status for a in answers if a.status.startswith("error:")), "")
        if broken and plan is not None:
            note = next((c.note for c in self.store.cells(self.run) if c.plan == key), "")
            return Given({}, failed=f"{broken.removeprefix('error:')} {note}".strip())
        full = sum(a.flops_full or 0 for a in good)
        return Given(
            {a.question: a.correct for a in good},
            sum(a.flops or 0 for a in good) / full if full else 1.0,
            max((a.kv_bytes or 0 for a in good), default=0),
        )

    def _part(self, questions: Sequence[Ask]) -> Task:
        return Task(self.task.settings, tuple(questions), self.task.open)


def readable(questions: Sequence[Ask], right: dict[str, bool]) -> list[str]:
    """The ids of those that the full model has answered; what it cannot be asked says nothing of a plan."""
    found = [ask.id for ask in questions if ask.id in right]
    if not found:
        raise WinnowError("No question could be asked, so nothing can be compared.")
    return found
