"""Timings: all plans in one run, interleaved, warmed up; refused where they would mislead."""

from __future__ import annotations

import itertools

import pytest
import torch

from winnow.bench import clock
from winnow.bench import speed as timing
from winnow.bench.native import fed, padded, shortened
from winnow.bench.schema import Cell, Timing
from winnow.bench.speed import lines, speed
from winnow.bench.store import Store
from winnow.bench.summary import speed_table
from winnow.core.errors import WinnowError
from winnow.engine.doctor import Check
from winnow.models.inputs import model_inputs

OPTIONS = {"sizes": (1, 2), "repeats": 3, "warm_up": 1, "new_tokens": 2}
PLANS = 5  # full, native-M, downsample-M, fastervlm, fastv


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "s.sqlite", create=True) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _phases_are_timed_once(monkeypatch):
    """More rounds make a time surer, which no test here looks at."""
    monkeypatch.setattr("winnow.bench.rounds.PHASE_ROUNDS", 1)


@pytest.fixture
def idle(monkeypatch):
    """A machine that nobody else uses, whose times do not scatter."""
    monkeypatch.setattr(timing, "busy", lambda device="cpu": "")
    monkeypatch.setattr(timing, "SPREAD", 100.0)


@pytest.fixture
def green(monkeypatch):
    """The doctor, of whom other tests are, finds nothing; a run of its own shows that he is asked."""
    monkeypatch.setattr(timing, "diagnose", lambda *_: [Check("identity", True, "")])


def run(little, task, store, **options):
    return speed(*little, ("fastervlm", "fastv"), ("16",), task, store, **(OPTIONS | options))


def test_a_run_has_every_plan_phase_and_batch(little, task, store, idle):
    key = run(little, task, store)
    found = {(t.plan, t.phase, t.batch) for t in store.timings(key)}
    plans = {cell.plan: cell.label for cell in store.cells(key)}
    assert sorted(plans.values()) == ["downsample-M", "fastervlm", "fastv", "full", "native-M"]
    for plan, label in plans.items():
        for prefix, batch in (("", 1), ("", 2), ("ragged ", timing.RAGGED)):
            phases = {p.removeprefix(prefix) for q, p, b in found if (q, b) == (plan, batch) and p.startswith(prefix)}
            want = {"first", "total", "token"} | (set() if label == "native-M" else set(timing.PHASES))
            assert phases == want
    about = store.run(key)
    assert about.settings["kind"] == "speed"
    assert about.environment["correctness"] == "green"
    assert {"processor", "cores", "threads", "load", "torch", "transformers", "winnow", "busy"} <= set(
        about.environment
    )
    own = [t for t in store.timings(key) if t.phase == "first" and t.batch == 1 and t.plan == "baseline:full"]
    assert [t.repeat for t in own] == [0, 1, 2]
    assert all(t.value_ms > 0 for t in store.timings(key) if t.phase in ("first", "total", "encoder", "prefill"))
    printed = lines(store, key)
    assert len(printed) == PLANS * 3
    assert all(line.speedup is not None for line in printed if line.label != "full")
    assert all((line.efficiency is not None) == (line.label in ("fastervlm", "fastv")) for line in printed)
    assert len(speed_table(printed)[1][0]) == len(speed_table(printed)[0])


def test_e7_rounds_are_interleaved_and_warmed_up(little, task, store, idle, green, monkeypatch):
    order = []
    plain = timing.Rounds._clean

    def noting(self, one):
        order.append((self.size, one.cell.label))
        return plain(self, one)

    monkeypatch.setattr(timing.Rounds, "_clean", noting)
    key = run(little, task, store, ragged=False)
    rounds = [order[i : i + PLANS] for i in range(0, len(order), PLANS)]
    assert len(rounds) == 2 * (OPTIONS["warm_up"] + OPTIONS["repeats"])
    assert all(len({label for _, label in one}) == PLANS for one in rounds), "each plan once in a round"
    assert len({tuple(label for _, label in one) for one in rounds}) > 1, "in an order of its own"
    kept = [t for t in store.timings(key) if t.phase == "first"]
    assert len(kept) == 2 * PLANS * OPTIONS["repeats"], "warm-up is not kept"


def test_e7_a_busy_machine_is_refused_before_anything_is_timed(little, task, store, green, monkeypatch):
    monkeypatch.setattr(clock.os, "getloadavg", lambda: (64.0, 1.0, 1.0))
    monkeypatch.setattr(clock.os, "cpu_count", lambda: 4)
    with pytest.raises(WinnowError, match=r"busy machine: the load average is 64.0 on 4 cores"):
        run(little, task, store)
    assert store.runs() == []
    monkeypatch.setattr(timing, "SPREAD", 100.0)
    key = run(little, task, store, allow_busy=True, ragged=False, sizes=(1,))
    assert "load average" in store.run(key).environment["busy"]
    assert all(line.speedup is None and line.efficiency is None for line in lines(store, key))


@pytest.mark.parametrize(
    ("load", "cores", "refused"), [(0.9, 1, False), (1.1, 1, True), (3.9, 16, False), (4.1, 16, True)]
)
def test_e7_a_quarter_of_the_cores_may_be_busy(monkeypatch, load, cores, refused):
    monkeypatch.setattr(clock.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(clock.os, "cpu_count", lambda: cores)
    assert bool(timing.busy()) == refused


def test_e7_times_that_scatter_are_refused(little, task, store, green, monkeypatch):
    monkeypatch.setattr(timing, "busy", lambda device="cpu": "")
    turns = itertools.cycle((1.0, 1.5, 2.0))
    monkeypatch.setattr(timing.Rounds, "_time", lambda self, one, tokens: next(turns))
    with pytest.raises(WinnowError, match="scatter by"):
        run(little, task, store, repeats=9)
    assert store.runs() == []
    monkeypatch.setattr(timing.Rounds, "_time", lambda self, one, tokens: 1.0 + 0.01 * tokens)
    assert store.run(run(little, task, store)).environment["busy"] == ""


def test_a_red_correctness_check_forbids_timing(little, task, store, idle, monkeypatch):
    monkeypatch.setattr(
        timing, "diagnose", lambda *_: [Check("identity", True, ""), Check("subset", False, "off by 1")]
    )
    with pytest.raises(WinnowError, match=r"correctness check is red: subset \(off by 1\)"):
        run(little, task, store)
    assert store.runs() == []


def test_e8_a_baseline_of_another_run_does_not_count(store):
    for key in ("mine", "other"):
        store.add_run(key, {"kind": "speed"}, {"busy": ""})
    store.add_cell("other", Cell("baseline:full", "full", "baseline", "", None))
    store.add_cell("mine", Cell("v1|x", "x", "method", "16", 16))
    store.add_timings([Timing("other", "baseline:full", "first", 1, 9.0, 0, 0)])
    store.add_timings([Timing("mine", "v1|x", phase, 1, 3.0, 0, 0) for phase in ("first", "total")])
    with pytest.raises(WinnowError, match="times of another run are no baseline"):
        lines(store, "mine")
    store.add_cell("mine", Cell("baseline:full", "full", "baseline", "", None))
    store.add_timings([Timing("mine", "baseline:full", phase, 1, 9.0, 0, 0) for phase in ("first", "total")])
    with pytest.raises(WinnowError, match="no times of its own of the full model and of native-16"):
        lines(store, "mine")
    store.add_cell("mine", Cell("baseline:native:16", "native-M", "baseline", "16", 16))
    store.add_timings([Timing("mine", "baseline:native:16", phase, 1, 1.0, 0, 0) for phase in ("first", "total")])
    found = {line.label: line for line in lines(store, "mine")}
    assert (found["x"].speedup.value, found["x"].efficiency.value) == (3.0, 0.75)


def test_two_calls_are_two_runs(little, task, store, idle, green):
    keys = {run(little, task, store, ragged=False, sizes=(1,)) for _ in range(2)}
    assert len(keys) == len(store.runs()) == 2


@pytest.mark.parametrize("fits", [0, 1])
def test_e9_a_plan_that_runs_out_of_memory_is_marked_and_the_others_are_timed(
    little, task, store, idle, monkeypatch, fits
):
    from winnow.methods.fastv import FastV

    plain, calls = FastV.reduce, []

    def full(self, view):
        calls.append(view.b)
        if view.b > fits and len(calls) > 6:  # in the middle of the rounds
            raise torch.OutOfMemoryError("no memory")
        return plain(self, view)

    monkeypatch.setattr(FastV, "reduce", full)
    monkeypatch.setattr(timing, "diagnose", lambda *_: [])  # its checks use FastV as well
    key = run(little, task, store, ragged=False)
    cells = {cell.label: cell for cell in store.cells(key)}
    assert len(cells) == PLANS
    assert cells["fastv"].status == ("ok" if fits else "error:oom")
    assert cells["fastv"].note == f"out of memory with batches of {'2' if fits else '1, 2'}"
    assert all(cell.status == "ok" and not cell.note for label, cell in cells.items() if label != "fastv")
    timed = {(line.label, line.batch) for line in lines(store, key)}
    assert timed == {(label, batch) for label in cells for batch in (1, 2) if label != "fastv" or batch <= fits}


@pytest.mark.parametrize("options", [{"repeats": 0}, {"sizes": (0,)}, {"new_tokens": 1}, {"warm_up": -1}])
def test_impossible_settings_are_told(little, task, store, idle, options):
    with pytest.raises(WinnowError, match="allowed: batches and repeats ≥ 1"):
        run(little, task, store, **options)


def test_native_m_feeds_the_first_m_embeddings_to_the_untouched_model(little, task):
    model, processor = little
    rows = [model_inputs(model, processor, task.open(a), a.text) for a in task.questions[:2]]
    short = padded([shortened(model, row, 5) for row in rows], 0)
    with torch.no_grad():
        given = fed(model, padded(rows, 0), short, rows, 5)
        assert (given["input_ids"] == model.config.image_token_id).sum(1).tolist() == [5, 5]
        features = model.model.get_image_features(rows[1]["pixel_values"]).pooler_output[0]
        assert torch.allclose(given["mm_encoder_outputs"]["image"].pooler_output[1], features[:5], atol=1e-5)
        batch = model(**given).logits[:, -1]
        whole = padded(rows, 0)
        alone = [model(**fed(model, row, shortened(model, row, 5), [row], 5)).logits[:, -1] for row in rows]
    assert torch.allclose(batch, torch.cat(alone), atol=1e-3)
    assert whole["input_ids"].shape[1] - given["input_ids"].shape[1] == 64 - 5
