"""A run: rounds in which every plan meets every number of clients, plans next to each other, in an order drawn anew."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from winnow.bench.meters import judge
from winnow.core.errors import WinnowError
from winnow.core.plan import FULL
from winnow.serve.bench.client import Endpoint, Outcome
from winnow.serve.bench.journal import Cell, Group, Journal
from winnow.serve.bench.requests import SERVED, Asking, Question, question

WARM = 2**41  # seeds from here are for what is not measured
WARM_CLIENTS = 8


@dataclass(frozen=True)
class Load:
    """What is asked of a server, and how often.

    Attributes:
        plans: the first is what the others are compared with.
        clients: numbers of clients, each of which sends its next request when the last one was answered.
        requests: of a cell, at least; two for each client at least.
        start: the seed of the first scene; each scene is asked about once in a run, under every plan.
        size: pixels of a scene's side.
    """

    plans: tuple[str, ...]
    clients: tuple[int, ...]
    requests: int = 20
    rounds: int = 5
    start: int = 0
    size: int = 224

    def __post_init__(self) -> None:
        for name in ("plans", "clients"):
            own = getattr(self, name)
            if not own or len(set(own)) != len(own):
                raise WinnowError(f"{name} {', '.join(map(str, own))}: give each once, and at least one.")

    def asked_at(self, clients: int) -> int:
        """Requests of a cell."""
        return max(self.requests, 2 * clients)

    def seeds(self, number: int, clients: int) -> range:
        """The scenes of a round at a number of clients."""
        counts = [self.asked_at(own) for own in self.clients]
        before = number * sum(counts) + sum(counts[: self.clients.index(clients)])
        return range(self.start + before, self.start + before + self.asked_at(clients))

    def settings(self) -> dict[str, Any]:
        """What could change a figure; how many rounds there are does not, so that a run can get more of them."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items() if name != "rounds"}


@dataclass
class Run:
    """A load on a server.

    Args:
        say: is told what the user should know.
        step: is called when a group is done.
    """

    endpoint: Endpoint
    asking: Asking
    load: Load
    say: Callable[[str], None]
    step: Callable[[], None] = field(default=lambda: None)

    def check(self) -> None:
        """Ask once under each plan.

        Raises:
            WinnowError: the server does not answer under one of them.
        """
        self.asking.check(self.load.plans)
        found: dict[str, Outcome] = {}
        for plan in self.load.plans:
            own = found[plan] = self.endpoint.ask(self.asking.body(question(WARM, self.load.size), plan))
            if own.error:
                told = f": {own.told}" if own.told else ""
                raise WinnowError(f"The server does not answer under the plan {plan} ({own.error}{told}).")
        for plan in {*self.load.plans} - {FULL, SERVED}:
            if FULL in found and found[plan].prompt >= found[FULL].prompt:
                self.say(
                    f"under {plan} the server reads {found[plan].prompt} tokens, and {found[FULL].prompt} under "
                    f"{FULL}: the plan acts later than where the server counts, or not at all."
                )

    def measure(self, journal: Journal, minutes: float | None = None) -> None:
        """Measure what the journal does not hold yet.

        Args:
            minutes: no round begins that would not end within them; the first always does.

        Raises:
            WinnowError: the server has stopped answering.
        """
        begun, longest = time.monotonic(), 0.0
        self._warm_up()
        for number in range(self.load.rounds):
            at = time.monotonic()
            if minutes is not None and number and at - begun + longest > 60 * minutes:
                self.say(
                    f"{number} of {self.load.rounds} rounds: another one would not end within {minutes:g} minutes."
                )
                return
            levels = list(self.load.clients)
            random.Random(number).shuffle(levels)
            for clients in levels:
                if not journal.has(number, clients):
                    journal.add(self._group(number, clients))
                self.step()
            longest = max(longest, time.monotonic() - at)

    def _warm_up(self) -> None:
        clients = min(WARM_CLIENTS, max(self.load.clients))
        for plan in self.load.plans:
            self._cell(plan, [question(WARM + i, self.load.size) for i in range(clients)], clients)

    def _group(self, number: int, clients: int) -> Group:
        asked = [question(seed, self.load.size) for seed in self.load.seeds(number, clients)]
        plans = list(self.load.plans)
        random.Random(f"{number} {clients}").shuffle(plans)
        return Group(number, clients, {plan: self._cell(plan, asked, clients) for plan in plans})

    def _cell(self, plan: str, asked: Sequence[Question], clients: int) -> Cell:
        bodies = [self.asking.body(own, plan) for own in asked]
        with ThreadPoolExecutor(clients) as pool:
            try:
                start = time.perf_counter()
                outcomes = list(pool.map(self.endpoint.ask, bodies))
                seconds = time.perf_counter() - start
            except BaseException:  # Ctrl-C among them: the threads end when their requests do
                self.endpoint.close()
                raise
        cell = Cell.of(outcomes, sum(map(_is_right, outcomes, asked)), seconds)
        if not cell.total:
            raise WinnowError(
                f"The server has stopped answering: under {plan}, with {clients} clients, requests ended with "
                f"{', '.join(cell.errors)}. What was measured before is kept; the same command goes on from there."
            )
        return cell


def _is_right(outcome: Outcome, asked: Question) -> bool:
    return not outcome.error and judge(outcome.text, asked.truth, cut=outcome.reason == "length")[0]
