"""A very small model, questions whose right answers are its own without compression, and a clock that does not vary."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from tests.bench.conftest import _built, _one_thread, counted, generated, little  # noqa: F401
from winnow.bench import sweep
from winnow.bench.meters import normal
from winnow.bench.plans import FULL_JOB
from winnow.bench.requests import batches
from winnow.bench.store import Store
from winnow.bench.tasks import Task, identity, world_task
from winnow.tuning import halving
from winnow.tuning.answers import Answers
from winnow.tuning.times import Clock

TOKENS, VISUAL = 3, 64
QUESTIONS = 36


@functools.cache
def _task(folder: str) -> Task:
    model, processor = _built()
    world = world_task(4 * QUESTIONS, seed=40)
    alike = max(batches(model, processor, world, 4 * QUESTIONS).batches, key=len)[
        :QUESTIONS
    ]  # of one length: few batches
    drawn = Task(world.settings, alike, world.open)
    with Store(f"{folder}/own.sqlite", create=True) as store:
        answers = Answers(model, processor, drawn, store, {"max_new_tokens": TOKENS}, 16)
        answers.ask([], drawn.questions, say=print)
        (cell,) = [c for c in store.cells(answers.run) if c.plan == FULL_JOB.key]
        said = {a.question: a.answer for a in store.answers(cell.id)}
    asks = tuple(dataclasses.replace(ask, truth=said[ask.id]) for ask in drawn.questions)
    return Task(drawn.settings | identity(asks), asks, drawn.open)


@pytest.fixture(scope="session")
def own_task(tmp_path_factory):
    return _task(str(tmp_path_factory.mktemp("own")))


@pytest.fixture
def cut_answers_count(monkeypatch):
    count_cut_answers(monkeypatch)


def count_cut_answers(monkeypatch):
    """The answers of random weights never end; here they count all the same."""
    monkeypatch.setattr(sweep, "judge", lambda said, truth, cut=False: (normal(said) == normal(truth), "ok"))


@pytest.fixture
def steady(monkeypatch):
    return steady_clock(monkeypatch)


def steady_clock(monkeypatch):
    """A clock by which the full model takes 10 ms, and each method of a plan a share that grows with what it keeps."""
    calls = []

    def takes(self, plan, inputs):
        calls.append(plan)
        took = 10.0
        for method in plan.methods:
            took *= 0.4 + 0.5 * method.keep.of(VISUAL) / VISUAL
        return took

    monkeypatch.setattr(Clock, "_first_token", takes)
    monkeypatch.setattr(halving, "LEAST", 6)  # two rounds of few questions
    return calls
