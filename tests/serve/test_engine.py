"""The engine without HTTP: the model in full, and jobs that nobody waits for."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest

from serve.process import MOTORCYCLE, drawn
from winnow.core.plan import Plan
from winnow.models.inputs import model_inputs
from winnow.serve.engine import Engine
from winnow.serve.job import Done, Failed, Job, Started, Text
from winnow.serve.runners import Runners
from winnow.serve.schema import Sampling


@pytest.fixture
def engine(reference: Any) -> Iterator[Engine]:
    model, processor = reference
    engine = Engine(Runners(model, processor, Plan.of("full"), bucket=32), processor.tokenizer, batch=4)
    engine.start()
    yield engine
    assert engine.close(30)


def job(reference: Any, plan: str | None, **sampling: Any) -> tuple[Job, queue.Queue[Any]]:
    events: queue.Queue[Any] = queue.Queue()
    inputs = model_inputs(*reference, drawn(54).image, MOTORCYCLE)
    how = Sampling(**{"max_tokens": 8, "temperature": 0.0} | sampling)
    return Job(inputs, (256,), None if plan is None else Plan.parse(plan), how, events.put), events


def told(events: queue.Queue[Any]) -> list[Any]:
    found: list[Any] = []
    while not found or not isinstance(found[-1], Done | Failed):
        found.append(events.get(timeout=60))
    return found


def test_the_model_in_full(engine: Engine, reference: Any) -> None:
    model, processor = reference
    inputs = model_inputs(model, processor, drawn(54).image, MOTORCYCLE)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    own, events = job(reference, None)
    engine.submit(own)
    found = told(events)
    assert found[0] == Started(inputs["input_ids"].shape[1], 256, 256, "full")
    said = "".join(event.piece for event in found if isinstance(event, Text))
    assert said == processor.decode(ids, skip_special_tokens=True)
    assert found[-1] == Done("stop", len(ids))


def test_a_plan_that_does_not_run_on_this_model_is_told(engine: Engine, reference: Any) -> None:
    own, events = job(reference, "fastv:layer=99,keep=64")
    engine.submit(own)
    (failed,) = told(events)
    assert (failed.error.status, failed.error.param) == (400, "winnow.plan")
    good, events = job(reference, "hiprune:keep=64")
    engine.submit(good)
    assert told(events)[-1] == Done("stop", 2)


def test_a_job_that_is_cancelled_before_its_turn_is_told_nothing(engine: Engine, reference: Any) -> None:
    own, events = job(reference, None)
    own.cancel()
    engine.submit(own)
    other, others = job(reference, None)
    engine.submit(other)
    assert isinstance(told(others)[-1], Done)
    assert events.empty()


def hooks(model: Any) -> list[tuple[str, int]]:
    """Every hook of a model: where it is, and which."""
    tables = ("_forward_hooks", "_forward_pre_hooks")
    return [(name, id(own)) for name, m in model.named_modules() for t in tables for own in getattr(m, t).values()]


def test_the_model_is_left_as_it_was(engine: Engine, reference: Any) -> None:
    """Hooks live on twins: the model that is served gets none, also while plans of all kinds run."""
    model, processor = reference
    inputs = model_inputs(model, processor, drawn(54).image, MOTORCYCLE)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)  # transformers leaves hooks of its own at first use
    before = hooks(model)
    for plan in ("hiprune:keep=64", "fastv:layer=2,keep=50%"):
        own, events = job(reference, plan)
        engine.submit(own)
        assert isinstance(told(events)[-1], Done)
        assert hooks(model) == before


def test_a_closed_engine_takes_nothing(reference: Any) -> None:
    model, processor = reference
    closed = Engine(Runners(model, processor, Plan.of("full"), bucket=32), processor.tokenizer, batch=4)
    closed.start()
    assert closed.close(30)
    own, events = job(reference, None)
    closed.submit(own)
    assert told(events)[0].error.code == "stopping"
