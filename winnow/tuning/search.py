"""tune: the fastest plan within a limit, by successive halving on paired answers and a check on held-out ones."""

from __future__ import annotations

import math
import random
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from winnow.bench.clock import busy
from winnow.bench.environment import code_settings, environment, model_settings, run_key
from winnow.bench.plans import FULL_JOB
from winnow.bench.requests import request
from winnow.bench.runner import NEW_TOKENS
from winnow.bench.store import Store
from winnow.bench.tasks import Ask, Task, data_task, world_task
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.engine.prompt_items import on_made_inputs
from winnow.tuning.answers import Answers, readable
from winnow.tuning.candidates import BUDGETS, Candidate, children, first, usable
from winnow.tuning.halving import (
    ETA,
    FINALISTS,
    Standing,
    climb,
    finalists,
    ladder,
    ranked,
    refuted,
    rounds_of,
    speed_order,
)
from winnow.tuning.limits import Limits
from winnow.tuning.loss import Loss, checked_confidence, loss_of
from winnow.tuning.result import Row, Tuned
from winnow.tuning.times import Clock, resolution

QUESTIONS = 1600  # of winnow's world
TIMED = (5, 9, 15)  # rounds of times in the first, in each later and in the last comparison


def tune(
    model: Any,
    processor: Any,
    questions: Task | str | Path | None = None,
    *,
    lose: float | str | None = None,
    prefill_ms: float | str | None = None,
    kv_bytes: int | str | None = None,
    methods: Sequence[str] = (),
    keep: Sequence[int | float | str] = BUDGETS,
    positions: str | None = None,
    confidence: float = 0.95,
    held_out: float = 0.5,
    store: str | Path | Store = "tune.sqlite",
    name: str = "",
    batch: int = 16,
    max_new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    resume: bool = True,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Tuned:
    """Find the plan that is fastest within a limit, and prove on other questions that it is within.

    Args:
        questions: a data file (see `winnow bench --data`) or a `Task`; default: 1,600 questions of winnow's world.
        lose: answers that may be lost, as a share of all: `"1%"` or 0.01. The fastest plan within is looked for.
        prefill_ms: milliseconds that the first token may take. Without `lose`, the plan that loses fewest answers is
            looked for.
        kv_bytes: bytes that the KV cache behind a prompt may hold; likewise.
        methods: slugs, plans and plan files to begin with; default: every method of the registry without training.
        keep: budgets of slugs to begin with.
        positions: `keep` or `compact`; default: both are tried.
        confidence: with which the plan keeps `lose`, over all plans that were tried.
        held_out: share of the questions that the search does not see; questions about one picture stay together.
        store: of answers and times; a search that was stopped goes on from it.
        name: of the model, for readers; its weights are hashed.
        seed: of the split.
        resume: keep what the store has of this search and its answers.
        say: called with a line about each round.

    Raises:
        WinnowError: a setting is wrong, or the questions cannot be asked.
    """
    limits, confidence = Limits.of(lose, prefill_ms, kv_bytes), checked_confidence(confidence)
    if batch < 1 or max_new_tokens < 1 or not keep:
        raise WinnowError(
            f"batch={batch}, max_new_tokens={max_new_tokens}, keep={list(keep)}: give at least 1 of each."
        )
    task = questions if isinstance(questions, Task) else _task(questions, model)
    parts = split(task.questions, held_out, seed)
    for row in task.bad:
        say(f"left out: {row}")
    settings = code_settings() | model_settings(model, processor, name)
    settings |= {"kind": "accuracy", "task": task.settings, "seed": 0, "max_new_tokens": max_new_tokens}
    wanted = {
        "kind": "tune", "answers": run_key(settings), "limits": vars(limits), "methods": list(methods),
        "keep": [str(k) for k in keep], "positions": positions, "confidence": confidence, "held_out": held_out,
        "split": seed,
    }  # fmt: skip
    opened = store if isinstance(store, Store) else Store(store, create=True)
    try:
        if not resume:
            for key in (run_key(settings), run_key(wanted)):
                opened.forget(key)
        opened.add_run(run_key(wanted), wanted, environment())
        answers = Answers(model, processor, task, opened, settings, batch, progress)
        clock = Clock(model, processor, _timed(model, processor, task, parts[0]), opened, run_key(wanted), progress)
        search = Search(answers, clock, parts, limits, confidence, positions, say)
        found = search.run(methods, keep)
    finally:
        if opened is not store:
            opened.close()
    return Tuned(*found, about=_about(settings, task, parts, model), unusable=search.unusable)


def split(questions: Sequence[Ask], held_out: float, seed: int) -> tuple[tuple[Ask, ...], tuple[Ask, ...]]:
    """(search, held out), picture by picture, in an order drawn anew."""
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 < held_out < 1:
        raise WinnowError(f"held_out={held_out!r}; allowed: a share between 0 and 1, such as 0.5.")
    pictures: dict[str, list[Ask]] = {}
    for ask in questions:
        pictures.setdefault(ask.image, []).append(ask)
    order = sorted(pictures)
    random.Random(seed).shuffle(order)
    rest: list[Ask] = []
    kept: list[Ask] = []
    for image in order:
        fits = len(kept) + len(pictures[image]) <= max(1.0, held_out * len(questions))
        (kept if fits else rest).extend(pictures[image])
    if not kept or not rest:
        raise WinnowError(
            f"{len(questions)} questions about {len(pictures)} pictures cannot be parted into a search and a check; "
            "give questions about more pictures."
        )
    return tuple(rest), tuple(kept)


class Search:
    """One search.

    Attributes:
        unusable: plans that the model cannot run, and why.
    """

    def __init__(
        self,
        answers: Answers,
        clock: Clock,
        parts: tuple[tuple[Ask, ...], tuple[Ask, ...]],
        limits: Limits,
        confidence: float,
        positions: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.answers, self.clock, self.limits, self.confidence = answers, clock, limits, confidence
        self.questions, self.held_out = parts
        self.positions, self.say = positions, say
        self.unusable: dict[str, str] = {}
        self._seen: set[str] = set()

    def run(
        self, methods: Sequence[str], keep: Sequence[int | float | str]
    ) -> tuple[Plan | None, tuple[Row, ...], Limits, float, float, float, int]:
        """All rounds and the check: the leading fields of `Tuned`."""
        content = self.answers.layout().n_content
        current = self._usable(first(methods, keep, content, self.positions))
        if not current:
            reason = next(iter(self.unusable.values()), "")
            raise WinnowError(f"None of the plans runs on this model; the first says: {reason}")
        later: list[Method] = []
        sizes = rounds_of(len(self.questions))
        for number, size in enumerate(sizes):
            standings, fine = self._compared(f"round {number + 1}", current, size, TIMED[min(number, 1)])
            order = ranked(standings, self.limits, fine)
            if not number:
                later = _methods_of(order)
            alive = self._alive(order, len(sizes) * len(current))
            stay = alive[: max(FINALISTS, math.ceil(len(order) / ETA))]
            table = next((s for s in alive if s.candidate.table), None)
            stay += [table] if table is not None and table not in stay else []
            self._tell(number, sizes, len(standings), stay)
            if number + 1 < len(sizes):
                current = [s.candidate for s in stay] + self._children(stay, later)
        return self._check(stay)

    def _compared(
        self, name: str, candidates: Sequence[Candidate], size: int, rounds: int
    ) -> tuple[list[Standing], float]:
        """The candidates after the first `size` questions, with times of this round; and how fine these are."""
        asked = self.questions[:size]
        self.answers.ask([c.plan for c in candidates], asked, say=self.say)
        full = self.answers.given(None).right
        ids = readable(asked, full)
        found = []
        for candidate in candidates:
            given = self.answers.given(candidate.plan)
            if given.failed:
                self.unusable[str(candidate.plan)] = given.failed
            else:
                found.append((candidate, loss_of(full, given.right, ids), given))
        if not found:
            raise WinnowError(f"Every plan failed; the first says: {next(iter(self.unusable.values()))}")
        times = self.clock.measure(name, [candidate.plan for candidate, _, _ in found], rounds)
        standings = [Standing(c, loss, times[c.key], given.flops, given.kv_bytes) for c, loss, given in found]
        return standings, resolution([s.time for s in standings])

    def _alive(self, order: Sequence[Standing], verdicts: int) -> list[Standing]:
        """Those that may still be meant; all of them where that is none, so that the table says why."""
        confidence = 1 - (1 - self.confidence) / max(1, verdicts)
        return [s for s in order if not refuted(s, self.limits, confidence)] or list(order[:FINALISTS])

    def _children(self, stay: Sequence[Standing], later: Sequence[Method]) -> list[Candidate]:
        """As many new plans as stay, near the leaders: the first idea of each, then the second."""
        info = self._info
        ideas = [children(s.candidate, info, later, faster=self._keeps(s), positions=self.positions) for s in stay]
        found: dict[str, Candidate] = {}
        while ideas and len(found) < len(stay):
            for idea in list(ideas):
                new = next((c for c in idea if c.key not in self._seen and self._usable([c])), None)
                if new is None:
                    ideas.remove(idea)
                elif len(found) < len(stay):
                    found[new.key] = new
        return list(found.values())

    def _keeps(self, standing: Standing) -> bool:
        """Whether less may do: what is lost looks allowed, or the plan costs too much."""
        if self.limits.lose is not None:
            return standing.loss.chance(self.limits.lose) >= 0.5
        return self.limits.costs_too_much(standing.time.ms, standing.kv_bytes)

    def _usable(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        candidates = list(candidates)
        with compress(self.answers.model, Plan(()), processor=self.answers.processor) as handle:
            self._info: ModelInfo = handle.info
            good, bad = usable(candidates, lambda plan: on_made_inputs(handle.bind(plan)))
        self.unusable |= bad
        self._seen |= {candidate.key for candidate in candidates}
        return good

    def _tell(self, number: int, sizes: Sequence[int], tried: int, stay: Sequence[Standing]) -> None:
        best = stay[0]
        self.say(
            f"round {number + 1} of {len(sizes)}: {tried} plans, {best.loss.n} questions; {len(stay)} stay; "
            f"leading: {best.candidate.plan}, {best.time.share.value:.2f} of the full model's time, "
            f"{best.loss.value:+.1%} lost"
        )

    def _check(self, stay: Sequence[Standing]) -> tuple[Plan | None, tuple[Row, ...], Limits, float, float, float, int]:
        """Time the finalists together, ask them what they have not seen, and say which of them may be claimed."""
        last = finalists(stay, self.limits)
        plans = [s.candidate.plan for s in last]
        self.say(f"check: {len(plans)} plans, {len(self.held_out)} questions held out")
        times = self.clock.measure("check", plans, TIMED[-1])
        self.answers.ask(plans, self.held_out, check=True, say=self.say)
        full = self.answers.given(None).right
        ids = readable(self.held_out, full)
        held: dict[str, Loss] = {}
        timed: list[Standing] = []
        for s in last:
            given = self.answers.given(s.candidate.plan)
            timed.append(Standing(s.candidate, s.loss, times[s.candidate.key], given.flops, given.kv_bytes))
            held[s.candidate.key] = loss_of(full, given.right, ids)
        fine = resolution([s.time for s in timed])
        verdicts = self._verdicts(timed, held, fine)
        plan = next((s.candidate.plan for s in timed if verdicts[s.candidate.key] == CHOSEN), None)
        rows = tuple(
            Row(s, held[s.candidate.key], verdicts[s.candidate.key])
            for s in sorted(timed, key=lambda s: speed_order(s, fine))
        )
        return plan, rows, self.limits, self.confidence, fine, times[FULL_JOB.key].ms, len(self._seen)

    def _verdicts(self, timed: Sequence[Standing], held: dict[str, Loss], fine: float) -> dict[str, str]:
        said = {s.candidate.key: "slower than a safer plan" for s in timed}
        for s in timed:
            if self.limits.costs_too_much(s.time.ms, s.kv_bytes):
                said[s.candidate.key] = "over the limit"
            elif self.limits.lose is not None and s.time.share.value >= 1:
                said[s.candidate.key] = "no faster than the full model"
        if self.limits.lose is None:
            within = [s for s in timed if not self.limits.costs_too_much(s.time.ms, s.kv_bytes)]
            order = [s.candidate.key for s in ranked(within, self.limits, fine)]
            return said | dict.fromkeys(order, "loses more, or is slower") | dict.fromkeys(order[:1], CHOSEN)
        steps = ladder(timed, self.limits, fine)
        proven = climb(steps, [held[s.candidate.key] for s in steps], self.limits, self.confidence)
        for number, s in enumerate(steps):
            said[s.candidate.key] = (
                "keeps the limit" if number < proven else "not proven" if number == proven else "not tested"
            )
        if proven:
            said[steps[proven - 1].candidate.key] = CHOSEN
        return said


CHOSEN = "the plan"


def _methods_of(order: Sequence[Standing]) -> list[Method]:
    """The methods of single plans, best first: what may go on behind another."""
    found: dict[str, Method] = {}
    for standing in order:
        if len(standing.candidate.parts) == 1 and standing.candidate.parts[0].budget is not None:
            method = standing.candidate.parts[0].method
            found.setdefault(method.slug, method)
    return list(found.values())


def _timed(model: Any, processor: Any, task: Task, asks: Sequence[Ask]) -> list[dict[str, Any]]:
    """Inputs of some questions of the search, for the clock."""
    found = []
    for ask in asks[:32]:
        try:
            found.append(request(model, processor, task, ask).inputs)
        except WinnowError:
            continue
    if not found:
        raise WinnowError("None of the first questions can be asked, so nothing can be timed.")
    return found


def _task(questions: str | Path | None, model: Any) -> Task:
    if questions is not None:
        return data_task(questions)
    side = getattr(getattr(model.config, "vision_config", None), "image_size", 224)
    return world_task(QUESTIONS, size=336 if isinstance(side, int) and side > 224 else 224)


def _about(settings: dict[str, Any], task: Task, parts: tuple[tuple[Ask, ...], ...], model: Any) -> dict[str, Any]:
    machine = environment()
    command = {"command": shlex.join(["winnow", *sys.argv[1:]])} if Path(sys.argv[0]).name == "winnow" else {}
    return {
        "model": {k: settings[k] for k in ("model", "revision", "weights", "device", "dtype", "attention")},
        "questions": task.settings | {"search": len(parts[0]), "held_out": len(parts[1])},
        "machine": {k: machine[k] for k in ("processor", "cores", "threads", "torch", "transformers", "winnow")}
        | {"busy": busy(model.device.type)},
        **command,
    }
