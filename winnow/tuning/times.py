"""Times to the first token of many plans, in rounds beside the plain model, and how finely they can be told apart."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from winnow.bench.clock import clocked
from winnow.bench.intervals import Median, median
from winnow.bench.native import Inputs
from winnow.bench.plans import FULL_JOB
from winnow.bench.rounds import equal
from winnow.bench.runner import bar
from winnow.bench.schema import Timing
from winnow.bench.store import Store
from winnow.core.plan import Plan
from winnow.engine.compress import compress

REQUESTS = 4  # different questions that are timed, one in each round
FINEST = 0.01  # of the full model's time; less is never called a difference


@dataclass(frozen=True)
class Time:
    """Milliseconds from the pixels to the first token, and the share of the plain model's in the same round."""

    ms: float
    share: Median


class Clock:
    """Times requests of one question.

    Each round times every plan, and the plain model without anything attached, once, in an order drawn anew. The times
    of one call stand in the store together or not at all, so that no share has its two halves from two machines.

    Args:
        rows: inputs of questions; those of the commonest length are timed.
        run: in the store.
    """

    def __init__(
        self, model: Any, processor: Any, rows: Sequence[Inputs], store: Store, run: str, progress: bool = False
    ) -> None:
        self.model, self.processor, self.store, self.run, self.progress = model, processor, store, run, progress
        self.rows = equal(list(rows), REQUESTS)

    def measure(self, name: str, plans: Sequence[Plan], rounds: int) -> dict[str, Time]:
        """The times of plans by key, and that of the full model, measured or as the store has them.

        Args:
            name: of the block of rounds.
            rounds: behind one that is not counted.
        """
        keys = {FULL_JOB.key: Plan(())} | {plan.key: plan for plan in plans}
        stored = self._stored(name)
        if any(len(stored.get(key, {})) != rounds for key in keys):
            self._run(name, keys, rounds)
            stored = self._stored(name)
        full = stored[FULL_JOB.key]
        return {
            key: Time(
                statistics.median(stored[key].values()), median([stored[key][i] / full[i] for i in sorted(stored[key])])
            )
            for key in keys
        }

    def _stored(self, name: str) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for timing in self.store.timings(self.run):
            if timing.phase == name:
                found.setdefault(timing.plan, {})[timing.repeat] = timing.value_ms
        return found

    def _run(self, name: str, keys: dict[str, Plan], rounds: int) -> None:
        order, rng, found = list(keys), random.Random(f"{self.run}:{name}"), []
        with bar((rounds + 1) * len(order), self.progress) as step:
            for turn in range(-1, rounds):
                rng.shuffle(order)
                inputs = self.rows[turn % len(self.rows)]
                for place, key in enumerate(order):
                    took = self._first_token(keys[key], inputs)
                    if turn >= 0:
                        found.append(Timing(self.run, key, name, 1, took, turn, place))
                    step()
        self.store.add_timings(found)

    def _first_token(self, plan: Plan, inputs: Inputs) -> float:
        if not plan.methods:
            return self._clocked(inputs)
        with compress(self.model, plan, processor=self.processor):
            return self._clocked(inputs)

    def _clocked(self, inputs: Inputs) -> float:
        ask: Callable[[], Any] = lambda: self.model.generate(  # noqa: E731
            **inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False, num_beams=1
        )
        with torch.inference_mode():
            return clocked(ask, self.model.device)[1]


def resolution(times: Sequence[Time]) -> float:
    """Shares of the full model's time that differ by less are called equal: what this machine could not tell apart."""
    halves = [(time.share.high - time.share.low) / 2 for time in times]
    return max(FINEST, statistics.median(halves)) if halves else FINEST
