"""bench: methods × budgets × questions into a store. A killed run resumes where it stopped."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from winnow.bench.baselines import BASELINES, NEED_EVIDENCE
from winnow.bench.environment import code_settings, environment, model_settings, run_key
from winnow.bench.plans import FULL_JOB, Job, Keep, jobs
from winnow.bench.requests import Request, Window, batches, one_of_each_picture, request
from winnow.bench.reuse import Encoded, layout_of, listening
from winnow.bench.schema import Question
from winnow.bench.shared_layers import SharedLayers
from winnow.bench.shared_pictures import SharedPictures
from winnow.bench.store import Store
from winnow.bench.sweep import Outcome, Part, Sweeper
from winnow.bench.tasks import Ask, Task
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.engine.handle import Handle
from winnow.engine.prompt_items import on_made_inputs

CHECKED = 50  # questions of each method that are also asked through `model.generate` with the pixels
DRAWN = 6  # questions whose overlays are kept
NEW_TOKENS = 16


def bench(
    model: Any,
    processor: Any,
    methods: Sequence[str],
    budgets: Sequence[Keep],
    task: Task,
    store: Store,
    *,
    name: str = "",
    baselines: Sequence[str] = BASELINES,
    batch: int = 16,
    seed: int = 0,
    max_new_tokens: int = NEW_TOKENS,
    positions: str | None = None,
    checked: int = CHECKED,
    shard: tuple[int, int] = (0, 1),
    resume: bool = True,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Measure methods and baselines at all budgets, and return the key of the run.

    Pictures are encoded once for all plans (`reuse`), or once for each plan that acts in the tower (`shared_pictures`),
    and blocks and layers that plans give equal inputs are computed once (`shared_layers`). Of each method `checked`
    questions, spread over its budgets, are also asked through the plain `model.generate` with the pixels, where nothing
    is shared.

    Args:
        methods, budgets: see `plans.jobs`.
        name: of the model, for readers; its weights are hashed.
        batch: questions in a forward; it changes no answer and is not part of the key.
        seed: of the baselines' draws.
        shard: (i, n): every n-th window of pictures from the i-th on, so that n processes can share a store.
        resume: keep what the store has of this run; otherwise it is measured anew.
        progress: show a bar with the time left on stderr.
        say: called with a message about rows that cannot be used.

    Raises:
        WinnowError: bad settings; or a check failed, in which case the cell's status is `mismatch`.
    """
    if batch < 1 or max_new_tokens < 1 or not 0 <= shard[0] < shard[1]:
        raise WinnowError(f"batch={batch}, max_new_tokens={max_new_tokens}, shard={shard}: use whole numbers ≥ 1.")
    with compress(model, Plan(()), processor=processor) as handle, SharedLayers(handle) as layers:
        asked = batches(model, processor, task, batch)
        for row in (*task.bad, *asked.bad):
            say(f"left out: {row}")
        content = layout_of(handle, request(model, processor, task, asked.alike[0][0])).n_content
        planned = _jobs(task, content, methods, budgets, baselines, positions)
        settings = code_settings() | model_settings(model, processor, name)
        settings |= {"kind": "accuracy", "task": task.settings, "seed": seed, "max_new_tokens": max_new_tokens}
        run = run_key(settings)
        if not resume:
            store.forget(run)
        store.add_run(run, settings, environment())
        good = {ask.id for own in asked.batches for ask in own}
        store.add_questions(_question(run, ask) for ask in task.questions if ask.id in good)
        cells = {j.key: store.add_cell(run, j.cell) for j in planned}
        planned = _supported(handle, planned, cells, store)
        reader = listening(handle, [j.plan for j in planned])
        pictures = SharedPictures(handle, reader, layers)
        sweeper = Sweeper(handle, processor, reader, layers, pictures, max_new_tokens, seed, _drawn(task))
        windows = pictures.windows(asked, [j.plan for j in planned], content, shard[1])
        parts = [sweeper.parts(window, planned) for window in windows]
        checks = {k: own for kind in zip(*parts, strict=True) for k, own in _checks(kind, checked).items()}
        mine = list(zip(windows, parts, strict=True))[shard[0] :: shard[1]]
        try:
            with bar(sum(len(own) * len(jobs) for _, apart in mine for own, jobs in apart), progress) as step:
                for window, apart in mine:
                    done = {job.key: store.answered(cells[job.key]) for job in planned}
                    _encode(sweeper, task, planned, done, window)
                    for asks, jobs in ((asks, jobs) for own, jobs in apart for asks in own if jobs):
                        again = {job.key for job in jobs if asks in checks[job.key]}
                        _batch(sweeper, task, store, jobs, cells, done, asks, again, step)
        finally:
            store.settle(run, FULL_JOB.key)
    refuse_mismatches(store, run)
    return run


def _jobs(task: Task, content: int, methods: Any, budgets: Any, baselines: Any, positions: Any) -> list[Job]:
    """Cells, with shares read as counts; baselines that need evidence only with it."""
    if not any(ask.evidence for ask in task.questions):
        baselines = [b for b in baselines if b not in NEED_EVIDENCE]
    return jobs(methods, budgets, content, baselines=baselines, positions=positions, shows=tuple(task.shows))


def _supported(handle: Handle, planned: list[Job], cells: dict[str, int], store: Store) -> list[Job]:
    """The cells that this model can run; the others are marked, and the sweep goes on."""
    found = []
    for job in planned:
        try:
            on_made_inputs(handle.bind(job.plan))
            found.append(job)
        except WinnowError as error:
            store.mark(cells[job.key], "error:unsupported", str(error))
    return found


def _encode(
    sweeper: Sweeper,
    task: Task,
    planned: list[Job],
    done: Mapping[str, Set[str]],
    window: Window,
) -> None:
    """What the tower makes of a window's pictures, under the plans that lack answers about any of them.

    Args:
        done: the questions that each job has answered before this window.
    """
    asked = {ask.id for ask in window.questions}
    lacking = [job.plan for job in planned if not asked <= done[job.key]]
    model, processor = sweeper.handle.model, sweeper.processor
    requests = [request(model, processor, task, ask) for ask in one_of_each_picture(window)]
    sweeper.pictures.encode(lacking, requests, window.rows)


def _batch(
    sweeper: Sweeper,
    task: Task,
    store: Store,
    planned: list[Job],
    cells: dict[str, int],
    done: Mapping[str, Set[str]],
    asks: Sequence[Ask],
    checked: Set[str],
    step: Callable[[], None],
) -> None:
    """One batch of questions in every cell that lacks an answer to any of them.

    Args:
        done: the questions that each job had answered before this window.
        checked: the jobs that are also asked through `model.generate`.
    """

    @functools.cache
    def shown(show: str) -> tuple[list[Request], Callable[[], Encoded]]:
        requests = [request(sweeper.handle.model, sweeper.processor, task, ask, show) for ask in asks]
        return requests, sweeper.shared(requests)

    for job in planned:
        if lacking := {ask.id for ask in asks} - done[job.key]:
            outcome = sweeper.run(job, cells[job.key], *shown(job.show), job.key in checked)
            _write(store, cells[job.key], outcome, lacking)
        step()


def _write(store: Store, cell: int, outcome: Outcome, lacking: Set[str]) -> None:
    """A batch with its marks, in one transaction."""
    answers = [a for a in outcome.answers if a.question in lacking]
    marks = {}
    if outcome.mismatch:
        marks = {"status": "mismatch", "note": f"{outcome.mismatch} has another answer through model.generate"}
    elif outcome.note:
        marks = {"status": next(a.status for a in outcome.answers if a.status != "ok"), "note": outcome.note}
    store.add_batch(cell, answers, [o for o in outcome.overlays if o.question in lacking], **marks)


def _checks(parts: Sequence[Part], wanted: int) -> dict[str, set[tuple[Ask, ...]]]:
    """For each cell, the batches that are checked: enough for `wanted` questions of each method.

    Large ones first: they are rounded as the calls are in which pictures were encoded for a window.

    Args:
        parts: of each window, for the same jobs.
    """
    batches = [own for turn in zip_longest(*(own for own, _ in parts)) for own in turn if own]
    planned = parts[0][1]
    found = {}
    for label in {job.cell.label for job in planned}:
        own = [job for job in planned if job.cell.label == label]
        each = -(-wanted // len(own))
        for place, job in enumerate(own):
            chosen: set[tuple[Ask, ...]] = set()
            order = [batches[(place + i) % len(batches)] for i in range(len(batches))]  # others for other budgets
            order.sort(key=len, reverse=True)
            while order and sum(map(len, chosen)) < each:
                chosen.add(order.pop(0))
            found[job.key] = chosen
    return found


def _drawn(task: Task) -> frozenset[str]:
    """Questions for overlays: those with evidence first, of as many pictures and types as can be."""
    types: dict[str, int] = {}
    pictures: dict[str, int] = {}
    ranked = []
    for place, ask in enumerate(task.questions):
        types[ask.type] = types.get(ask.type, 0) + 1
        pictures[ask.image] = pictures.get(ask.image, 0) + 1
        ranked.append((not ask.evidence, pictures[ask.image], types[ask.type], place, ask.id))
    return frozenset(entry[-1] for entry in sorted(ranked)[:DRAWN])


def _question(run: str, ask: Ask) -> Question:
    return Question(run, ask.id, ask.type, ask.text, ask.truth, ask.image, ask.evidence)


def refuse_mismatches(store: Store, run: str) -> None:
    wrong = [cell for cell in store.cells(run) if cell.status == "mismatch"]
    if wrong:
        named = "; ".join(f"{cell.label} {cell.budget}: {cell.note}" for cell in wrong)
        raise WinnowError(
            f"The sweep and model.generate disagree, so these cells must not be used: {named}. "
            f"This is a fault of winnow or of the method; please report it. The store is {Path(store.path)}."
        )


@contextmanager
def bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    if not show:
        yield lambda: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("batches × cells", total=total)
        yield lambda: bar.advance(task)
