"""Successive halving under limits: who stays, in which order, and which of the last ones may be claimed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from winnow.tuning.candidates import Candidate
from winnow.tuning.limits import Limits
from winnow.tuning.loss import Loss
from winnow.tuning.times import Time

ETA = 3  # questions grow by this factor, and one plan of so many stays
LEAST = 32  # questions of the first round
FINALISTS = 5


@dataclass(frozen=True)
class Standing:
    """A candidate and what is known of it.

    Attributes:
        loss: on the questions of the search.
        flops: share of the full model's.
        kv_bytes: the most that a question took.
    """

    candidate: Candidate
    loss: Loss
    time: Time
    flops: float
    kv_bytes: int


def rounds_of(questions: int) -> tuple[int, ...]:
    """How many questions each round has asked by its end; the last has asked all."""
    steps = max(0, int(math.log(max(1.0, questions / LEAST), ETA) + 1e-9))
    return tuple(max(1, round(questions / ETA**step)) for step in reversed(range(steps + 1)))


def speed_order(standing: Standing, resolution: float) -> tuple[int, float, str]:
    """Fastest first: by time as far as it can be told apart, then by FLOPs."""
    return round(standing.time.share.value / resolution), standing.flops, standing.candidate.key


def ranked(standings: Sequence[Standing], limits: Limits, resolution: float) -> list[Standing]:
    """Best first.

    With a limit on what is lost: by the time that a plan is expected to save, which is what it saves times how probable
    it looks that it keeps the limit. Without one: by what it loses, then by speed.
    """

    def worth(standing: Standing) -> tuple[float, float, str]:
        if limits.lose is None:
            bucket, flops, key = speed_order(standing, resolution)
            return standing.loss.value, bucket * resolution + flops * resolution / 2, key
        saved = 1 - round(standing.time.share.value / resolution) * resolution
        return (
            -(saved * standing.loss.chance(limits.lose) if saved > 0 else saved),
            standing.flops,
            standing.candidate.key,
        )

    return sorted(standings, key=worth)


def refuted(standing: Standing, limits: Limits, confidence: float) -> str:
    """Why a plan cannot be meant any more; empty where it can.

    Args:
        confidence: of each single verdict; the caller corrects it for how many there are.
    """
    if limits.costs_too_much(standing.time.share.low / standing.time.share.value * standing.time.ms, standing.kv_bytes):
        return "over the limit"
    if limits.lose is not None and standing.loss.at_least(confidence) > limits.lose:
        return "loses too much"
    return ""


def finalists(ranked_: Sequence[Standing], limits: Limits) -> list[Standing]:
    """Those that are asked the questions held out: the best, the safest, and the best that a table would name."""
    best = list(ranked_[: FINALISTS - 2])
    table = next((s for s in ranked_ if s.candidate.table), None)
    by_chance = sorted(ranked_, key=lambda s: -s.loss.chance(limits.lose or 0.0))
    safest = next((s for s in by_chance if s.time.share.value < 1), None)
    for extra in (safest, table):
        if extra is not None and extra not in best:
            best.append(extra)
    return best


def ladder(last: Sequence[Standing], limits: Limits, resolution: float) -> list[Standing]:
    """The order in which claims are tested on the questions held out: safest first, each faster than those before it.

    It is made of what the search has seen and of times, never of the answers that it is tested on: so each test may
    have the whole confidence as long as none before it failed (fixed-sequence testing).
    """
    within = [s for s in last if not limits.costs_too_much(s.time.ms, s.kv_bytes) and s.time.share.value < 1]
    steps: list[Standing] = []
    for standing in sorted(within, key=lambda s: (-s.loss.chance(limits.lose or 0.0), s.candidate.key)):
        if not steps or speed_order(standing, resolution) < speed_order(steps[-1], resolution):
            steps.append(standing)
    return steps


def climb(steps: Sequence[Standing], held_out: Sequence[Loss], limits: Limits, confidence: float) -> int:
    """How many steps of the ladder hold, up to the first that is not proven."""
    for number, loss in enumerate(held_out[: len(steps)]):
        if limits.lose is not None and not (loss.n and loss.at_most(confidence) <= limits.lose):
            return number
    return len(steps)
