"""Rounds: every plan once in each, in an order drawn anew, over one batch of questions."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from winnow.bench.clock import clocked
from winnow.bench.native import Inputs, fed, lengths_of, padded, shortened
from winnow.bench.plans import Job
from winnow.bench.schema import Timing
from winnow.core.memory import out_of_memory
from winnow.engine.compress import compress

PHASES = ("encoder", "projector", "select", "prefill")
PHASE_ROUNDS = 5


class Rounds:
    """Interleaved rounds over one batch."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        run: str,
        rows: list[Inputs],
        size: int,
        prefix: str,
        new_tokens: int,
        step: Callable[[], None],
    ) -> None:
        self.model, self.processor, self.run = model, processor, run
        self.rows, self.size, self.prefix, self.new_tokens = rows, size, prefix, new_tokens
        self.failed: set[str] = set()
        self.step = step
        self.inputs = padded(rows, model.config.get_text_config().pad_token_id or 0)

    def measure(self, timed: Sequence[Job], warm_up: int, repeats: int) -> list[Timing]:
        order, rng = list(timed), random.Random(0)
        found: list[Timing] = []
        for turn in range(-warm_up, repeats + PHASE_ROUNDS):
            rng.shuffle(order)
            for one in order:
                if one.key not in self.failed:
                    times = self._guarded(one, self._phases if turn >= repeats else self._clean)
                    number = turn - repeats if turn >= repeats else turn
                    found += [
                        Timing(self.run, one.key, self.prefix + phase, self.size, ms, number, turn)
                        for phase, ms in times.items()
                        if turn >= 0
                    ]
                self.step()
        return [t for t in found if t.plan not in self.failed]

    def _guarded(self, one: Job, measure: Callable[[Job], dict[str, float]]) -> dict[str, float]:
        try:
            return measure(one)
        except Exception as error:
            if not out_of_memory(error):
                raise
        self.failed.add(one.key)
        gc.collect()
        return {}

    def _clean(self, one: Job) -> dict[str, float]:
        """Host time from the pixels to the first and to the last token, nothing else attached."""
        if not one.plan.methods:
            return self._both(one)
        with compress(self.model, one.plan, processor=self.processor):
            return self._both(one)

    def _both(self, one: Job) -> dict[str, float]:
        first, total = self._time(one, 1), self._time(one, self.new_tokens)
        return {"first": first, "total": total, "token": (total - first) / (self.new_tokens - 1)}

    def _time(self, one: Job, tokens: int) -> float:
        given: Callable[[], Inputs] = lambda: self.inputs  # noqa: E731
        if (m := one.fed) is not None:
            pad = self.model.config.get_text_config().pad_token_id or 0
            ids = padded([shortened(self.model, row, m) for row in self.rows], pad)
            given = lambda: fed(self.model, self.inputs, ids, self.rows, m)  # noqa: E731
        with torch.inference_mode():
            return clocked(lambda: self._generate(given(), tokens), self.model.device)[1]

    def _generate(self, inputs: Inputs, tokens: int) -> None:
        self.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, num_beams=1)

    def _phases(self, one: Job) -> dict[str, float]:
        """The engine's own clock, which waits for the device at each phase."""
        if one.fed is not None:
            return {}
        with compress(self.model, one.plan, processor=self.processor) as handle, torch.inference_mode():
            handle.timing = True
            self._generate(dict(self.inputs), self.new_tokens)
            times = handle.last.times  # type: ignore[union-attr]
        return {phase: times.get(phase, 0.0) for phase in PHASES}


def equal(rows: list[Inputs], size: int) -> list[Inputs]:
    """A batch of questions of the commonest length, repeated where there are too few."""
    lengths = lengths_of(rows)
    commonest = max(sorted(set(lengths)), key=lengths.count)
    own = [row for row, length in zip(rows, lengths, strict=True) if length == commonest]
    return [own[i % len(own)] for i in range(size)]


def unequal(rows: list[Inputs], size: int) -> list[Inputs]:
    """A batch of questions of as many lengths as there are, spread over their range."""
    ordered = [row for _, row in sorted(zip(lengths_of(rows), rows, strict=True), key=lambda pair: pair[0])]
    return [ordered[i * (len(ordered) - 1) // max(1, size - 1)] for i in range(size)]
