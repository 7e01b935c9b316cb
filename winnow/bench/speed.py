"""speed: how long requests take under each plan, next to the plain model and to the model that is fed M tokens.

- `first`: pixels to the first token; `total`: pixels to the last of a fixed number of tokens. Both are host time around
  the plain `model.generate`, synchronised with the device, without any other clock running.
- `token`: each further token, (total − first) / (tokens − 1).
- encoder, projector, select, prefill: the engine's clock, in rounds of their own.
- native-M is the untouched model that encodes the picture in full and is then fed M of its embeddings: nothing that
  acts behind the encoder can be faster.

Rounds are interleaved: in each, every plan runs once, in an order drawn anew. All that is compared ran in one run.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from winnow.bench.clock import busy
from winnow.bench.environment import code_settings, environment, model_settings, run_key
from winnow.bench.intervals import Median, efficiency, median
from winnow.bench.plans import FULL_JOB, Job, Keep, jobs
from winnow.bench.requests import joined, request
from winnow.bench.reuse import Encoded, listening
from winnow.bench.rounds import PHASE_ROUNDS, PHASES, Rounds, equal, unequal
from winnow.bench.runner import bar
from winnow.bench.schema import Timing
from winnow.bench.store import Store
from winnow.bench.tasks import Task
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.engine.doctor import diagnose
from winnow.engine.prompt_items import on_made_inputs

BATCHES = (1, 8, 32)
RAGGED = 8  # questions of unequal lengths in one padded batch
REPEATS, WARM_UP, NEW_TOKENS = 20, 5, 8
SPREAD = 0.10  # interquartile range of the full model, as a share of its median


def speed(
    model: Any,
    processor: Any,
    methods: Sequence[str],
    budgets: Sequence[Keep],
    task: Task,
    store: Store,
    *,
    name: str = "",
    sizes: Sequence[int] = BATCHES,
    ragged: bool = True,
    repeats: int = REPEATS,
    warm_up: int = WARM_UP,
    new_tokens: int = NEW_TOKENS,
    allow_busy: bool = False,
    progress: bool = False,
) -> str:
    """Time methods, the full model, native-M and downsample-M at all budgets, and return the key of the run.

    Every call is a run of its own: times of two calls are never compared.

    Args:
        sizes: questions in a batch; `ragged` adds a batch of `RAGGED` questions of unequal lengths, left-padded.
        new_tokens: length of every answer, even if the model would stop earlier; at least 2.
        allow_busy: time on a busy machine; such a run is marked, and no speed-up is computed from it.

    Raises:
        WinnowError: bad settings, a red correctness check, a busy machine, or times that scatter too much.
    """
    if min(repeats, *sizes) < 1 or warm_up < 0 or new_tokens < 2:
        raise WinnowError(
            f"batches={tuple(sizes)}, repeats={repeats}, warm_up={warm_up}, new_tokens={new_tokens}: "
            "allowed: batches and repeats ≥ 1, warm_up ≥ 0, new_tokens ≥ 2."
        )
    reason = busy(model.device.type)
    if reason and not allow_busy:
        raise WinnowError(f"No times from a busy machine: {reason}. Wait, or mark the run with --allow-busy.")
    red = [check for check in diagnose(model, processor) if not check.ok]
    if red:
        raise WinnowError(
            f"No times while a correctness check is red: {red[0].name} ({red[0].detail}). See `winnow doctor`."
        )
    rows = [request(model, processor, task, ask).inputs for ask in task.questions]
    timed = _timed(model, processor, task, methods, budgets)
    machine = environment() | {"correctness": "green", "busy": reason}
    settings = code_settings() | model_settings(model, processor, name)
    settings |= {"kind": "speed", "task": task.settings, "repeats": repeats, "warm_up": warm_up}
    settings |= {"new_tokens": new_tokens, "nonce": uuid.uuid4().hex}
    run = run_key(settings)
    cases = [(size, "", equal(rows, size)) for size in sizes]
    if ragged:
        cases.append((RAGGED, "ragged ", unequal(rows, RAGGED)))
    timings: list[Timing] = []
    failed: dict[str, list[str]] = {}
    with bar(len(cases) * len(timed) * (warm_up + repeats + PHASE_ROUNDS), progress) as step:
        for size, prefix, given in cases:
            clock = Rounds(model, processor, run, given, size, prefix, new_tokens, step)
            timings += clock.measure(timed, warm_up, repeats)
            for key in clock.failed:
                failed.setdefault(key, []).append(f"{prefix}{size}")
    spread = _spread(timings, min(sizes))
    if spread > SPREAD and not allow_busy:
        raise WinnowError(
            f"The times of the full model scatter by {spread:.0%} of their median (allowed {SPREAD:.0%}): something "
            "else is running, or the clock rate changes. Wait, or mark the run with --allow-busy."
        )
    if spread > SPREAD:
        machine["busy"] = reason or f"the times of the full model scatter by {spread:.0%}"
    store.add_run(run, settings, machine)
    for one in timed:
        cell = store.add_cell(run, one.cell)
        if one.key in failed:
            state = "ok" if any(t.plan == one.key for t in timings) else "error:oom"
            store.mark(cell, state, f"out of memory with batches of {', '.join(failed[one.key])}")
    store.add_timings(timings)
    return run


def _timed(model: Any, processor: Any, task: Task, methods: Sequence[str], budgets: Sequence[Keep]) -> list[Job]:
    """The full model, native-M and downsample-M at all budgets, and the methods that this model can run."""
    with compress(model, Plan(()), processor=processor) as handle:
        alone = request(model, processor, task, task.questions[0])
        content = Encoded(handle, listening(handle, []), joined([alone])).layouts[0].n_content
        planned = jobs(methods, budgets, content, baselines=())
        for job in planned:
            on_made_inputs(handle.bind(job.plan))  # a method that cannot run here is a mistake of the caller's
    pooled = [job for job in planned if job.cell.label == "downsample-M"]
    native = [
        Job(replace(job.cell, plan=f"baseline:native:{job.cell.budget}", label="native-M"), Plan(()), fed=job.cell.keep)
        for job in pooled
    ]
    return [FULL_JOB, *native, *pooled, *(job for job in planned if job.cell.kind == "method")]


def _spread(timings: Sequence[Timing], size: int) -> float:
    own = [t.value_ms for t in timings if (t.plan, t.phase, t.batch) == (FULL_JOB.key, "first", size)]
    return median(own).spread


@dataclass(frozen=True)
class Line:
    """Times of one plan at one batch size, milliseconds; compared with baselines of the same rounds."""

    label: str
    budget: str
    batch: int
    ragged: bool
    first: Median
    total: Median
    phases: dict[str, float]
    speedup: Median | None
    efficiency: Median | None


def lines(store: Store, run: str) -> list[Line]:
    """What `winnow speed` prints. Speed-ups are left out where the machine was busy.

    Raises:
        WinnowError: the run holds no baseline of its own; those of another run do not count.
    """
    about = store.run(run)
    values: dict[tuple[str, str, int], list[float]] = {}
    for t in store.timings(run):
        values.setdefault((t.plan, t.phase, t.batch), []).append(t.value_ms)
    cells = {cell.plan: cell for cell in store.cells(run)}
    found = []
    for plan, phase, batch in sorted(values):
        if not phase.endswith("first"):
            continue
        prefix, cell = phase.removesuffix("first"), cells[plan]
        full = values.get((FULL_JOB.key, phase, batch))
        native = values.get((f"baseline:native:{cell.budget}", phase, batch))
        if full is None or (native is None and cell.kind == "method" and cell.budget):
            raise WinnowError(
                f"The run {run} has no times of its own of the full model and of native-{cell.budget}; "
                "times of another run are no baseline. Run `winnow speed` with all of them."
            )
        own = values[plan, phase, batch]
        told = not about.environment.get("busy")
        phases = {p: median(v).value for p in (*PHASES, "token") if (v := values.get((plan, prefix + p, batch)))}
        pairs = list(zip(full, own, strict=True))
        found.append(
            Line(
                cell.label, cell.budget, batch, bool(prefix), median(own),
                median(values[plan, prefix + "total", batch]), phases,
                median([a / b for a, b in pairs]) if told and plan != FULL_JOB.key else None,
                efficiency(full, own, native) if told and native and cell.kind == "method" else None,
            )
        )  # fmt: skip
    return found
