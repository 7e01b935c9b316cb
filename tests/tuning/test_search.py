"""Whole searches on a very small model: what is found, what is asked, and what is left when one is stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import winnow
from winnow.bench.store import Store
from winnow.bench.tasks import Task
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.tuning.result import Tuned
from winnow.tuning.search import split, tune

from .conftest import TOKENS, _built, count_cut_answers, counted, steady_clock

pytestmark = [
    pytest.mark.usefixtures("cut_answers_count", "_one_thread"),
    pytest.mark.xdist_group("search"),  # what is compared with is searched once, by one worker
]
OPTIONS = {
    "batch": 32,
    "methods": ("fastervlm", "fastv"),
    "keep": ("60", "24"),
    "max_new_tokens": TOKENS,
    "confidence": 0.7,
}


@pytest.fixture
def search(little, own_task, tmp_path, steady):
    def run(store="a.sqlite", questions=own_task, **options):
        return tune(*little, questions, store=tmp_path / store, **(OPTIONS | {"lose": "50%"} | options))

    return run


class Whole(NamedTuple):
    """A finished search with the usual options."""

    found: Tuned
    file: Path  # of its store
    asked: int  # calls of `generate`
    timed: int
    lines: list[str]


@pytest.fixture(scope="module")
def whole(own_task, tmp_path_factory):
    torch.set_num_threads(1)
    model, processor = _built()
    file, lines = tmp_path_factory.mktemp("search") / "a.sqlite", []
    with pytest.MonkeyPatch.context() as patch:
        count_cut_answers(patch)
        timed, asked = steady_clock(patch), counted(patch, model)
        found = tune(model, processor, own_task, store=file, lose="50%", say=lines.append, **OPTIONS)
    return Whole(found, file, len(asked), len(timed), lines)


@pytest.fixture
def finished(whole, tmp_path):
    """The finished search; its store is where `search` finds it."""
    shutil.copy(whole.file, tmp_path / "a.sqlite")
    return whole


def test_the_plan_keeps_the_limit_on_questions_held_out_and_no_single_method_that_does_is_faster(whole, tmp_path):
    found, lines = whole.found, whole.lines
    row = found.chosen
    assert found.plan is not None
    assert row.verdict == "the plan"
    assert abs(row.held_out.n - 18) <= 2
    assert row.held_out.at_most(0.7) <= 0.5
    held = [r for r in found.rows if r.standing.candidate.table and r.held_out.at_most(0.7) <= 0.5]
    assert all(row.standing.time.share.value <= r.standing.time.share.value + 1e-9 for r in held)
    assert lines[0].startswith("round 1 of")
    assert lines[-1].startswith("check:")
    assert found.tried >= 4
    assert [len(line) for line in found.table()[1]] == [len(found.table()[0])] * len(found.rows)
    file = found.save(tmp_path / "found.plan.json")
    content = json.loads(file.read_text())
    assert Plan.of(str(file)) == found.plan
    assert content["limits"] == {"lose": 0.5}
    assert content["confidence"] == 0.7
    assert content["measured"]["held_out"]["questions"] == row.held_out.n
    assert content["questions"]["search"] == 36 - row.held_out.n
    assert content["full_prefill_ms"] == 10.0
    assert len(content["model"]["weights"]) == 32


def test_a_saved_plan_compresses_a_model(whole, little, tmp_path):
    found = whole.found
    file = found.save(tmp_path / "found.plan.json")
    with winnow.compress(little[0], str(file), processor=little[1]) as handle:
        assert handle.plan == found.plan


def test_a_finished_search_asks_and_times_nothing_again(search, finished, generated, steady):
    assert finished.asked > 0
    assert finished.timed > 0
    again = search()
    assert (len(generated), len(steady)) == (0, 0)
    assert again.as_json() == finished.found.as_json()
    other = search(lose="40%")
    assert other.limits.lose == 0.4
    assert len(generated) < finished.asked, "answers do not depend on the limit"


def test_a_search_that_was_stopped_goes_on_to_the_same_result(search, whole, little, generated, monkeypatch):
    asked = whole.asked
    model = little[0]
    counted = type(model).generate
    calls = []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == asked // 2:
            raise KeyboardInterrupt
        return counted(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", dying)
        with pytest.raises(KeyboardInterrupt):
            search("stopped.sqlite")
    before = len(generated)
    resumed = search("stopped.sqlite")
    assert 0 < len(generated) - before <= asked - asked // 2 + 4
    first, second = (found.as_json() for found in (whole.found, resumed))
    assert first.pop("machine").keys() == second.pop("machine").keys()
    assert first == second


def test_without_resume_everything_is_asked_anew(search, finished, generated):
    search(resume=False)
    assert len(generated) == finished.asked > 0


def test_a_limit_that_cannot_be_proven_gives_no_plan_and_says_how_many_questions_may_do(search):
    found = search(lose="1%", keep=("63",), confidence=0.99)
    assert found.plan is None
    assert found.chosen is None
    assert "No plan is proven" in found.why_none
    with pytest.raises(WinnowError, match="No plan is proven"):
        found.save("never.plan.json")
    assert found.as_json()["plan"] is None


def test_within_a_limit_of_bytes_the_plan_loses_least(search):
    full = search(lose=None, kv_bytes="1GB", methods=("fastervlm:keep=64", "fastervlm:keep=8"))
    most = max(row.standing.kv_bytes for row in full.rows)
    found = search(lose=None, kv_bytes=most - 1, methods=("fastervlm:keep=64", "fastervlm:keep=8"))
    assert "keep=64" in str(full.plan) or full.chosen.standing.loss.value <= 0
    assert found.chosen.standing.kv_bytes < most
    within = [row for row in found.rows if row.verdict != "over the limit"]
    assert found.chosen.standing.loss.value == min(row.standing.loss.value for row in within)


def test_within_a_limit_of_time_no_plan_is_over_it(search):
    found = search(lose=None, prefill_ms=6)
    assert found.chosen.standing.time.ms <= 6
    assert search(lose=None, prefill_ms="0.001ms").plan is None


def test_a_plan_that_the_model_cannot_run_is_named_with_the_reason(search):
    found = search(methods=("fastervlm", "fastv:layer=77"), keep=("16",))
    assert list(found.unusable) == ["fastv:layer=77"]
    assert "3 LM layers" in found.unusable["fastv:layer=77"]
    with pytest.raises(WinnowError, match="None of the plans runs"):
        search(methods=("fastv:layer=77",))


def test_no_picture_is_on_both_sides_of_the_split(own_task):
    search, held = split(own_task.questions, 0.4, 0)
    assert len(search) + len(held) == len(own_task.questions)
    assert not {a.image for a in search} & {a.image for a in held}
    assert abs(len(held) - 0.4 * len(own_task.questions)) <= 3
    assert split(own_task.questions, 0.4, 0) == (search, held)
    assert split(own_task.questions, 0.4, 1) != (search, held)
    same = [dataclasses.replace(a, image="one") for a in own_task.questions]
    with pytest.raises(WinnowError, match="cannot be parted"):
        split(same, 0.5, 0)
    for bad in (0, 1, -1, "half", True):
        with pytest.raises(WinnowError, match="held_out"):
            split(own_task.questions, bad, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lose": None}, "No limit was given"),
        ({"confidence": 2}, "confidence=2"),
        ({"batch": 0}, "batch=0"),
        ({"keep": ()}, "give at least 1"),
        ({"methods": ("nonesuch",)}, "nonesuch"),
        ({"positions": "sideways"}, "sideways"),
        ({"questions": "none.jsonl"}, "no data file"),
    ],
)
def test_mistakes_are_named(search, options, said):
    with pytest.raises(WinnowError, match=said):
        search(**options)


def test_a_question_that_cannot_be_asked_is_left_out_once(search, own_task):
    broken = dataclasses.replace(
        own_task.questions[5], id="broken", text="<image> <image>?", image="world:test:9999:224"
    )
    task = Task(own_task.settings | {"hash": "other"}, (*own_task.questions, broken), own_task.open)
    lines = []
    found = search(questions=task, say=lines.append)
    assert found.plan is not None
    assert sum("broken" in line for line in lines) <= 1


def test_the_store_of_a_search_can_be_read_by_others(finished, tmp_path):
    with Store(tmp_path / "a.sqlite") as store:
        assert sorted(run.settings["kind"] for run in store.runs()) == ["accuracy", "tune"]


def test_times_of_a_real_clock_are_kept_as_one_block_beside_the_plain_model(little, own_task, tmp_path):
    from winnow.bench.requests import request
    from winnow.tuning.times import Clock

    rows = [request(*little, own_task, ask).inputs for ask in own_task.questions[:4]]
    plans = [Plan.of("fastervlm:keep=8"), Plan.of("fastv:keep=8")]
    with Store(tmp_path / "t.sqlite", create=True) as store:
        store.add_run("r", {}, {})
        clock = Clock(*little, rows, store, "r")
        times = clock.measure("one", plans, 2)
        kept = store.timings("r")
        assert len(times) == 3
        assert len(kept) == 6
        assert all(t.ms > 0 for t in times.values())
        assert times["baseline:full"].share.value == 1
        assert clock.measure("one", plans, 2) == times
        assert clock.measure("one", plans[:1], 2).keys() < times.keys()
        assert store.timings("r") == kept, "nothing was timed again"
        clock.measure("one", [*plans, Plan.of("fastv:keep=4")], 2)
        assert not {t.value_ms for t in store.timings("r")} & {t.value_ms for t in kept}, "one block, one session"
