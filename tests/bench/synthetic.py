"""A store as `winnow bench` and `winnow speed` fill it, with answers drawn from known probabilities."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from winnow.bench.baselines import uniform_ids
from winnow.bench.schema import Answer, Cell, Overlay, Question, Timing
from winnow.bench.store import Store
from winnow.bench.tasks import Ask, world_task
from winnow.core.layout import Layout

SIDE, TEXT = 16, 12  # tokens of a picture's side, and of the prompt's text
VISUAL = SIDE * SIDE
LAYOUT = Layout.grid(SIDE, SIDE)
METHODS = {"fastervlm": 0.55, "divprune": 0.6, "visionzip": 0.5, "hiprune": 0.52, "vtc-cls": 0.56, "todre": 0.62,
           "fastv": 0.4, "pyramiddrop": 0.3}  # fmt: skip
BASELINES = {"random": 1.0, "uniform": 0.8, "downsample": 0.85, "ceiling": 0.05, "oracle": 0.0}
SAMPLED = ("random", "uniform", "downsample")
HARD = ("relation", "reading", "referring", "two-hop", "count-if")
MODEL = {"model": "reference/small", "weights": "0" * 16, "configuration": "1" * 16, "code": "2" * 16,
         "device": "cpu", "dtype": "float32", "attention": "sdpa", "winnow": "0.1.0", "torch": "2.13.0"}  # fmt: skip
MACHINE = {"machine": "x86_64", "system": "Linux 6.1", "python": "3.11.2", "processor": "a processor", "cores": 4}


def accuracy(
    path: Path,
    *,
    questions: int = 260,
    budgets: Sequence[int] = (128, 64, 32, 16),
    methods: Sequence[str] = tuple(METHODS),
    pictures: int = 6,
    seed: int = 0,
    **settings: Any,
) -> str:
    """Add a run of answers, and return its key."""
    rng, task = random.Random(seed), world_task(questions)
    asked, run = task.questions, f"accuracy-{seed}"
    shown = asked[:: max(1, len(asked) // pictures)][:pictures] if pictures else ()
    with Store(path, create=True) as store:
        settings = MODEL | {"kind": "accuracy", "task": task.settings, "seed": seed} | settings
        store.add_run(run, settings, MACHINE | {"command": "winnow bench --questions 260"})
        store.add_questions(Question(run, a.id, a.type, a.text, a.truth, a.image, a.evidence) for a in asked)
        full = {a.id: rng.random() < (0.55 if a.type in HARD else 0.88) for a in asked}
        cell = store.add_cell(run, Cell("baseline:full", "full", "baseline", "", None))
        store.add_batch(cell, [_answer(cell, a, full[a.id], VISUAL, VISUAL, None, rng) for a in asked])
        rows = [(name, "method", METHODS[name]) for name in methods]
        rows += [(name, "baseline", loss) for name, loss in BASELINES.items()]
        for name, kind, loss in rows:
            for keep in budgets:
                label = f"{name}-M" if name in SAMPLED else name
                cell = store.add_cell(run, Cell(_plan(name, keep), label, kind, str(keep), keep))
                risk, answers = loss * (1 - keep / VISUAL) ** 3, []
                for ask in asked:
                    lost = rng.random() < risk * (1.3 if ask.type in HARD else 0.7)
                    right = not lost if full[ask.id] else rng.random() < 0.08
                    recall = rng.betavariate(8 * (1 - risk) + 0.5, 6 * risk + 0.5) if ask.evidence else None
                    answers.append(_answer(cell, ask, right, keep, _read(name, keep), recall, rng))
                overlays = [] if name == "ceiling" else [_overlay(cell, ask, keep, name, rng) for ask in shown]
                store.add_batch(cell, answers, overlays)
        store.settle(run, "baseline:full")
    return run


def speed(
    path: Path,
    *,
    budgets: Sequence[int] = (128, 64, 32, 16),
    methods: Sequence[str] = tuple(METHODS),
    repeats: int = 8,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    **machine: Any,
) -> str:
    """Add a run of times, and return its key."""
    rng, run = random.Random(seed), f"speed-{seed}"
    with Store(path, create=True) as store:
        about = MACHINE | {"correctness": "green", "busy": "", "command": "winnow speed"} | machine
        store.add_run(run, MODEL | {"kind": "speed"} | (settings or {}), about)
        store.add_cell(run, Cell("baseline:full", "full", "baseline", "", None))
        for keep in budgets:
            for name in methods:
                store.add_cell(run, Cell(_plan(name, keep), name, "method", str(keep), keep))
            for name in ("native", "downsample"):
                store.add_cell(run, Cell(_plan(name, keep), f"{name}-M", "baseline", str(keep), keep))
        plans = [("baseline:full", "full", VISUAL)]
        plans += [(_plan(name, keep), name, keep) for keep in budgets for name in (*methods, "native", "downsample")]
        store.add_timings(timing for plan in plans for timing in _timings(run, *plan, repeats, rng))
    return run


def _plan(name: str, keep: int) -> str:
    return f"{name}:keep={keep}" if name in METHODS else f"baseline:{name}:{keep}"


def _read(name: str, keep: int) -> float:
    return VISUAL * 0.25 + keep * 0.75 if name in ("fastv", "pyramiddrop") else keep


def _answer(
    cell: int, ask: Ask, right: bool, kept: int, read: float, recall: float | None, rng: random.Random
) -> Answer:
    answer, tokens = ask.truth if right else rng.choice(("yes!", "no!", "some", "")), TEXT + read
    return Answer(
        cell, ask.id, ask.type, ask.truth, answer, right, None, recall, kept, float(tokens),
        int(tokens * 9e6), int((TEXT + VISUAL) * 9e6), int(tokens * 2048), (TEXT + VISUAL) * 2048,
        "ok" if answer else "empty",
    )  # fmt: skip


def _overlay(cell: int, ask: Ask, keep: int, name: str, rng: random.Random) -> Overlay:
    if name == "uniform":
        return Overlay(cell, ask.id, uniform_ids(LAYOUT, keep), None, (SIDE, SIDE))
    near = LAYOUT.covering(ask.evidence)
    weights = [rng.random() * (3.0 if on else 1.0) for on in near]
    kept = tuple(sorted(sorted(range(VISUAL), key=lambda i: -weights[i])[:keep]))
    if name != "visionzip":
        return Overlay(cell, ask.id, kept, None, (SIDE, SIDE))
    targets = kept[:: max(1, len(kept) // 6)]
    merged: dict[int, list[int]] = {i: [i] for i in kept}
    for i in sorted(set(range(VISUAL)) - set(kept)):
        row, col = divmod(i, SIDE)
        merged[min(targets, key=lambda t: abs(t % SIDE - col) + abs(t // SIDE - row))].append(i)
    return Overlay(cell, ask.id, kept, {t: tuple(sorted(s)) for t, s in merged.items()}, (SIDE, SIDE))


def _timings(run: str, plan: str, name: str, keep: int, repeats: int, rng: random.Random) -> Iterator[Timing]:
    for prefix, batch in (("", 1), ("", 8), ("ragged ", 8)):
        select = 0.0 if name in ("full", "native") else 0.4
        phases = {"encoder": 9.0, "projector": 0.6, "select": select, "prefill": 1 + _read(name, keep) * 0.09}
        phases["first"] = sum(phases.values())
        phases |= {"token": 2.1, "total": phases["first"] + 7 * 2.1}
        for repeat in range(repeats):
            for phase, value in phases.items():
                took = value * batch**0.8 * rng.uniform(0.99, 1.01)
                yield Timing(run, plan, prefix + phase, batch, took, repeat, repeat)
