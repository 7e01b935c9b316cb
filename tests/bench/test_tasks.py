"""Data files: good rows are asked, bad rows are counted and named, and what they hold is in the key."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from winnow.bench.requests import batches, request
from winnow.bench.tasks import data_task, open_world, world_task
from winnow.core.errors import WinnowError
from winnow.world import export, scene


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    return tmp_path


def write(folder, *rows):
    path = folder / "my.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


GOOD = {"image": "red.png", "question": "what color is it?", "answer": "red"}


def test_a_row_becomes_a_question(folder):
    row = GOOD | {"evidence": [[10, 5, 30, 20]], "type": "color", "id": "one"}
    task = data_task(write(folder, row, GOOD | {"answer": 3}))
    first, second = task.questions
    assert (first.id, first.type, first.truth, first.evidence) == ("one", "color", "red", ((0.25, 0.25, 0.75, 1.0),))
    assert (second.id, second.type, second.truth, second.evidence) == ("row-000002", "all", "3", ())
    assert task.open(first).size == (40, 20)
    assert task.bad == ()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (b"{not json", "line 2: it is not a JSON object"),
        (b"\xff\xfe{}", "line 2: it is not a JSON object"),
        (b"[" * 100_000, "line 2: it is not a JSON object"),
        ([1, 2], "line 2: it is not a JSON object"),
        ({"question": "a", "answer": "b"}, "line 2: its image is None"),
        (GOOD | {"question": " "}, "line 2: its question is ' '"),
        (GOOD | {"answer": None}, "line 2: its answer is None"),
        (GOOD | {"answer": True}, "line 2: its answer is True"),
        (GOOD | {"image": "none.png"}, "line 2: the picture cannot be used"),
        (GOOD | {"image": "half.png"}, "line 2: the picture cannot be used"),
        (GOOD | {"image": "my.jsonl"}, "line 2: the picture cannot be used"),
        (GOOD | {"image": "https://example.org/a.png"}, "line 2: the picture cannot be used"),
        (GOOD | {"evidence": [[0, 0, 41, 20]]}, "line 2: its evidence [0, 0, 41, 20] is not a box"),
        (GOOD | {"evidence": [[5, 5, 5, 6]]}, "line 2: its evidence"),
        (GOOD | {"evidence": "left"}, "line 2: its evidence 'left' is not a box"),
        (GOOD | {"id": "row-000001"}, "line 2: the id 'row-000001' is taken"),
        (b'{"image": "' + b"x" * 2**21 + b'"}', "line 2: it is not a JSON object"),
    ],
)
def test_e1_a_bad_row_is_counted_and_named_and_the_others_are_asked(folder, row, told):
    task = data_task(write(folder, GOOD, row, GOOD | {"id": "last"}))
    assert [a.id for a in task.questions] == ["row-000001", "last"]
    assert len(task.bad) == 1
    assert task.bad[0].startswith(told)
    assert task.settings["rows_left_out"] == 1


def test_e1_a_file_that_is_absent_or_useless_is_told_with_the_command_to_get_one(folder):
    with pytest.raises(WinnowError, match=r"There is no data file .*winnow world export FOLDER"):
        data_task(folder / "absent.jsonl")
    with pytest.raises(WinnowError, match=r"no row that can be used .line 1: its answer"):
        data_task(write(folder, GOOD | {"answer": ""}))
    with pytest.raises(WinnowError, match="it is empty"):
        data_task(write(folder, b"", b"  "))


def test_e1_the_content_is_in_the_settings(folder):
    def settings(*rows):
        return data_task(write(folder, *rows)).settings

    before = settings(GOOD)
    assert settings(GOOD) == before
    for row in (GOOD | {"answer": "blue"}, GOOD | {"question": "why?"}, GOOD | {"evidence": [[0, 0, 1, 1]]}):
        assert settings(row) != before
    Image.new("RGB", (40, 20), "blue").save(folder / "red.png")
    assert settings(GOOD) != before, "another picture under the same name is another task"


def test_an_export_of_the_world_is_the_same_questions(tmp_path):
    lines = export(tmp_path / "scenes", 2, seed=5)
    task = data_task(lines)
    drawn = [q for seed in (5, 6) for q in scene(seed, split="test").questions]
    assert [(a.type, a.text, a.truth) for a in task.questions] == [(q.type, q.text, q.answer) for q in drawn]
    assert len(data_task(lines, 3).questions) == 3
    again = {a.id: a for a in world_task(26, seed=5).questions}
    first = next(a for a in task.questions if a.text == drawn[0].text)
    same = next(a for a in again.values() if a.text == first.text and a.image.split(":")[2] == "5")
    assert same.evidence == first.evidence
    assert np.array_equal(np.asarray(task.open(first)), np.asarray(open_world(same)))


def test_impossible_worlds_are_told():
    with pytest.raises(WinnowError, match="ask at least 1"):
        world_task(0)
    with pytest.raises(WinnowError, match="unknown split"):
        world_task(5, split="validation")


def test_batches_hold_questions_of_equal_shapes_and_all_of_them_once(little, task):
    found = batches(*little, task, 3)
    assert sorted(a.id for own in found.batches for a in own) == sorted(a.id for a in task.questions)
    for own in found.batches:
        assert len(own) <= 3
        assert len({request(*little, task, a).inputs["input_ids"].shape for a in own}) == 1
    assert batches(*little, task, 3) == found


def test_boxes_are_fractions_of_what_the_model_is_shown(little, folder):
    # The processor cuts the middle square out of a 40 × 20 picture.
    task = data_task(write(folder, GOOD | {"evidence": [[10, 0, 30, 20], [0, 0, 20, 10]]}))
    shown = request(*little, task, task.questions[0]).evidence
    assert np.allclose(shown, [(0, 0, 1, 1), (-0.5, 0, 0.5, 0.5)])
