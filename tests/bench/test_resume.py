"""A sweep that is killed anywhere goes on to the store of an uninterrupted one; other settings are another run."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from winnow.bench.runner import bench
from winnow.bench.store import Store
from winnow.bench.tasks import world_task

from .conftest import BUDGETS, METHODS, QUESTIONS


def _sweep(path, model, processor, task):
    torch.set_num_threads(1)
    with Store(path, create=True) as store:
        bench(model, processor, METHODS, BUDGETS, task, store, batch=2, max_new_tokens=1, checked=4, baselines=())


def _killed(path, little, task, after):
    """Run the sweep in a process of its own and kill it after some seconds; whether it was still running then."""
    # A fork inherits the model and the imports: what is killed is the sweep, not the start of Python.
    process = multiprocessing.get_context("fork").Process(target=_sweep, args=(path, *little, task))
    process.start()
    process.join(after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("count", [5, pytest.param(12, marks=pytest.mark.full)])
def test_e2_killed_at_random_points_resumes_to_the_same_store(little, task, tmp_path, exported, count):
    start = time.monotonic()
    _sweep(tmp_path / "whole.sqlite", *little, task)
    takes = time.monotonic() - start
    with Store(tmp_path / "whole.sqlite") as whole:
        wanted = exported(whole)
    rng, kills, number = random.Random(5), 0, 0
    partial = set()
    while kills < count:
        path = tmp_path / f"{number}.sqlite"
        number += 1
        while kills < count and _killed(path, little, task, rng.uniform(0.05, 0.6) * takes):
            kills += 1
            with Store(path, create=True) as store:
                partial.add(sum(len(store.answers(c.id)) for run in store.runs() for c in store.cells(run.key)))
        _sweep(path, *little, task)
        with Store(path) as store:
            assert exported(store) == wanted
    assert 2 * len(partial) > count - 1, f"kills left stores of only {partial} answers; they must fall everywhere"


def test_e2_killed_inside_a_transaction_leaves_none_of_it(little, task, tmp_path, exported, monkeypatch):
    _sweep(tmp_path / "whole.sqlite", *little, task)
    with Store(tmp_path / "whole.sqlite") as whole:
        wanted = exported(whole)
    plain = Store._insert

    def killed_at(write):
        count = 0

        def insert(self, table, mode, rows):
            nonlocal count
            plain(self, table, mode, rows)
            if table == "answers":
                count += 1
                if count == write:
                    os.kill(os.getpid(), signal.SIGKILL)  # written, but not committed

        return insert

    for write in (1, 3, 20):
        path = tmp_path / f"{write}.sqlite"
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_insert", killed_at(write))
            assert _killed(path, little, task, 60)
        with Store(path) as part:
            batches = sum(len(part.answers(cell.id)) > 0 for run in part.runs() for cell in part.cells(run.key))
            assert batches <= write - 1
        _sweep(path, *little, task)
        with Store(path) as part:
            assert exported(part) == wanted


def test_e2_ctrl_c_leaves_a_store_that_can_be_read_and_resumed(sweep, finished, exported, monkeypatch, little):
    whole, _ = finished("whole.sqlite")
    model, calls = little[0], []
    plain = type(model).generate

    def generate(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            sweep("part.sqlite")
    part, key = sweep("part.sqlite")
    assert exported(part) == exported(whole)
    assert all(a.agrees is not None for cell in part.cells(key) for a in part.answers(cell.id))


def test_a_finished_sweep_asks_nothing_again(sweep, finished, whole, generated, exported):
    store, key = finished()
    before = exported(store)
    assert whole[2] > 0
    assert sweep()[1] == key
    assert not generated
    assert exported(store) == before


def test_a_new_method_is_added_to_the_run_and_the_old_cells_stay(sweep, generated):
    store, key = sweep(methods=("fastervlm",))
    asked = len(generated)
    assert sweep(methods=("fastervlm", "fastv"))[1] == key
    added = len(generated) - asked
    assert 0 < added < asked
    assert {cell.label for cell in store.cells(key)} >= {"fastervlm", "fastv"}


def test_without_resume_everything_is_asked_anew(sweep, finished, whole, generated, exported):
    store, _ = finished()
    before = exported(store)
    sweep(resume=False)
    assert len(generated) == whole[2] > 0
    assert exported(store) == before


def _other_weights(model):
    model.lm_head.weight.data[7, 3] += 1e-6


def _eager(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_new_tokens": 2}, {"name": "another"}])
def test_e3_a_changed_setting_is_another_run(sweep, finished, change):
    store, key = finished()
    other, changed = sweep(**change)
    assert changed != key
    assert len(store.runs()) == 2
    assert all(len(other.answers(cell.id)) == QUESTIONS for cell in other.cells(changed))


@pytest.mark.parametrize("change", [_other_weights, _eager])
def test_e3_a_changed_model_is_another_run(sweep, little, change):
    import copy

    _, key = sweep(methods=("fastervlm",), budgets=("4",))
    model = copy.deepcopy(little[0])
    change(model)
    assert sweep(methods=("fastervlm",), budgets=("4",), model=model)[1] != key


def test_e3_other_questions_are_another_run(sweep, task):
    _, key = sweep(methods=("fastervlm",), budgets=("4",))
    asks = list(task.questions)
    asks[0] = dataclasses.replace(asks[0], truth="something else")
    from winnow.bench.tasks import Task, identity

    changed = Task(task.settings | identity(asks), tuple(asks), task.open)
    assert sweep(methods=("fastervlm",), budgets=("4",), task=changed)[1] != key
    assert sweep(methods=("fastervlm",), budgets=("4",), task=world_task(QUESTIONS, seed=41))[1] != key


def test_e3_another_setting_of_a_method_is_another_cell(sweep, generated):
    store, key = sweep(methods=("fastv:layer=1,keep=4",), budgets=("16",))
    asked = len(generated)
    assert sweep(methods=("fastv:layer=2,keep=4",), budgets=("16",))[1] == key
    assert len(generated) > asked
    plans = [cell.plan for cell in store.cells(key) if cell.kind == "method"]
    assert len(plans) == 2
