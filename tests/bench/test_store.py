"""The store: what is written comes back; what is no store is refused in words."""

from __future__ import annotations

import json
import sqlite3

import pytest

from winnow.bench.schema import Answer, Cell, Overlay, Question, Timing
from winnow.bench.store import Store
from winnow.core.errors import WinnowError


def answer(cell, question, **values):
    fields = {"type": "count", "truth": "2", "answer": "2", "correct": True, "agrees": None, "evidence_recall": 0.5}
    counts = {"kept": 4, "layer_tokens": 9.5, "flops": 10**13, "flops_full": 10**14, "kv_bytes": 8, "kv_bytes_full": 9}
    return Answer(cell, question, **(fields | counts | {"status": "ok"} | values))


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "deep" / "a.sqlite", create=True) as opened:
        opened.add_run("k", {"seed": 0}, {"cores": 2})
        yield opened


def test_records_come_back_as_they_were_written(store):
    cell = store.add_cell("k", Cell("v1|x", "x", "method", "64", 64))
    question = Question("k", "q", "count", "how many?", "2", "world:test:1:224", ((0.0, 0.25, 0.5, 1.0),))
    overlays = [
        Overlay(cell, "q", (1, 5), {1: (1, 2), 5: (5,)}, (4, 4)),
        Overlay(cell, "r", (), None, (1, 1)),
    ]
    store.add_questions([question])
    store.add_batch(cell, [answer(cell, "q"), answer(cell, "r", evidence_recall=None, answer="é 中")], overlays)
    store.add_timings([Timing("k", "v1|x", "first", 1, 1.25, 0, 3)])
    assert store.questions("k") == [question]
    assert store.answers(cell) == [answer(cell, "q"), answer(cell, "r", evidence_recall=None, answer="é 中")]
    assert store.overlays(cell) == overlays
    assert store.timings("k") == [Timing("k", "v1|x", "first", 1, 1.25, 0, 3)]
    assert store.add_cell("k", Cell("v1|x", "x", "method", "64", 64)) == cell
    assert [run.settings for run in store.runs()] == [{"seed": 0}]
    with Store(store.path) as again:
        assert again.answers(cell) == store.answers(cell)


def test_errors_are_not_answers_and_are_summed_up_on_the_cell(store):
    full = store.add_cell("k", Cell("baseline:full", "full", "baseline", "", None))
    cell = store.add_cell("k", Cell("v1|x", "x", "method", "64", 64))
    store.add_batch(full, [answer(full, q) for q in "abc"])
    store.add_batch(cell, [answer(cell, "a"), answer(cell, "b", answer="3"), answer(cell, "c", status="error:oom")])
    assert store.answered(cell) == {"a", "b"}
    store.settle("k", "baseline:full")
    assert [a.agrees for a in store.answers(cell)] == [True, False, None]
    assert [c.status for c in store.cells("k")] == ["ok", "error:oom"]
    store.add_batch(cell, [answer(cell, "c")])
    store.settle("k", "baseline:full")
    assert [c.status for c in store.cells("k")] == ["ok", "ok"]


def test_settling_touches_no_other_run(store):
    store.add_run("other", {}, {})
    cells = [store.add_cell(run, Cell("baseline:full", "full", "baseline", "", None)) for run in ("k", "other")]
    for cell, said in zip(cells, "23", strict=True):
        store.add_batch(cell, [answer(cell, "q", answer=said)])
    own = store.add_cell("k", Cell("v1|x", "x", "method", "64", 64))
    store.add_batch(own, [answer(own, "q")])
    store.settle("k", "baseline:full")
    assert store.answers(own)[0].agrees is True
    assert store.answers(cells[1])[0].agrees is None
    store.forget("k")
    assert [run.key for run in store.runs()] == ["other"]
    assert store.answers(own) == []
    assert len(store.answers(cells[1])) == 1


def test_a_batch_is_written_whole_or_not_at_all(store):
    cell = store.add_cell("k", Cell("v1|x", "x", "method", "64", 64))
    broken = Overlay(cell, "q", (1,), None, None)  # type: ignore[arg-type]
    store.add_batch(cell, [answer(cell, "q")])
    with pytest.raises(sqlite3.IntegrityError):
        store.add_batch(cell, [answer(cell, "r"), answer(cell, None)], [broken], "mismatch", "no")
    assert [a.question for a in store.answers(cell)] == ["q"]
    assert store.cells("k")[0].status == "ok"


def test_the_export_has_one_order_and_leaves_out_what_no_second_run_repeats(tmp_path):
    exports = []
    for name, order in (("a", "abc"), ("b", "cab")):
        with Store(tmp_path / f"{name}.sqlite", create=True) as store:
            store.add_run("k", {"x": 1, "a": 2} if name == "a" else {"a": 2, "x": 1}, {"load": name})
            for plan in order:
                cell = store.add_cell("k", Cell(plan, plan, "method", "", None))
                store.add_batch(cell, [answer(cell, q) for q in order])
            store.add_timings([Timing("k", "a", "first", 1, 1.0 if name == "a" else 2.0, 0, 0)])
            exports.append(store.export_json(tmp_path / "out.json").read_bytes())
            measured = json.loads(store.export_json(tmp_path / "all.json", measured=True).read_bytes())
            assert measured["runs"][0]["environment"] == {"load": name}
            assert len(measured["runs"][0]["timings"]) == 1
    assert exports[0] == exports[1]


def test_what_is_no_store_is_refused_and_left_as_it_is(tmp_path):
    with pytest.raises(WinnowError, match=r"There is no store .*winnow bench --store"):
        Store(tmp_path / "absent.sqlite")
    assert not (tmp_path / "absent.sqlite").exists()
    text = tmp_path / "notes.txt"
    text.write_text("a shopping list, long enough to be no database\n" * 40)
    before = text.read_bytes()
    for create in (False, True):
        with pytest.raises(WinnowError, match="not an SQLite file"):
            Store(text, create=create)
    assert text.read_bytes() == before
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(WinnowError, match="holds no runs"):
        Store(other, create=True)
    with sqlite3.connect(other) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(WinnowError, match="version 99; this winnow reads version 1"):
        Store(other)


def test_a_full_disk_is_told_and_what_was_finished_is_kept(store):
    cell = store.add_cell("k", Cell("v1|x", "x", "method", "64", 64))
    store.add_batch(cell, [answer(cell, "q")])
    store._db.execute(f"PRAGMA max_page_count = {store._db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(WinnowError, match="cannot be written: the disk is full"):
        store.add_batch(cell, [answer(cell, f"r{i}", answer="x" * 4000) for i in range(50)])
    assert [a.question for a in store.answers(cell)] == ["q"]
