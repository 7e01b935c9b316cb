"""Plan files are read wherever a plan is; files that are none are refused in one sentence."""

from __future__ import annotations

import json

import pytest

from winnow.bench.plans import jobs
from winnow.cli_bench import named
from winnow.cli_run import plans
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.core.plan_file import LARGEST, names_file, read_plan_file, write_plan_file
from winnow.engine.compress import chosen_plan

TEXT = "fastervlm:keep=50% + fastv:keep=25%,layer=3 | positions=compact"


@pytest.fixture
def file(tmp_path):
    return write_plan_file(tmp_path / "deep" / "my.plan.json", Plan.of(TEXT).key, {"model": {"name": "ä"}})


def test_a_plan_file_is_a_plan_everywhere(file):
    want = Plan.of(TEXT)
    assert Plan.of(str(file)) == Plan.of(file) == Plan.of(f" {file} ") == chosen_plan(str(file), None, None) == want
    assert Plan.of(str(file), positions="keep").positions == "keep"
    assert plans([str(file)], None, None) == [want]
    assert named([str(file), "fastv,divprune"]) == (str(file), "fastv", "divprune")
    assert [job.plan for job in jobs([str(file)], ["64"], 256, baselines=()) if job.cell.kind == "method"] == [want]
    assert read_plan_file(file)["model"] == {"name": "ä"}


def test_names_of_files_and_plans_are_told_apart(tmp_path, monkeypatch):
    assert names_file("a.plan.json")
    assert names_file("/x/y z/a.json")
    assert not names_file("fastv:keep=3")
    assert not names_file("mine:table=a.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k=1.json").touch()
    assert names_file("k=1.json")
    assert not names_file("x=" + "y" * 5000 + ".json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no plan file"),
        (b"\xff\xfe", "is no plan file"),
        (b"[]", "is no plan file"),
        (b'{"plan": "fastv"}', "is no plan file"),
        (b"[" * 100_000, "is no plan file"),
        (b" " * (LARGEST + 1), "is no plan file"),
        (b'{"winnow_plan": 2, "plan": "fastv"}', "has version 2; this winnow reads version 1"),
        (b'{"winnow_plan": 1}', "holds no plan: its plan is None"),
        (b'{"winnow_plan": 1, "plan": ["fastv"]}', "holds no plan"),
        (b'{"winnow_plan": 1, "plan": "other.json"}', "holds no plan"),
        (b'{"winnow_plan": 1, "plan": "nonesuch:keep=3"}', "nonesuch"),
        (b'{"winnow_plan": 1, "plan": "v9|fastv"}', "schema 9"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, said):
    path = tmp_path / "bad.plan.json"
    path.write_bytes(content)
    with pytest.raises(WinnowError, match=said):
        Plan.of(str(path))


def test_files_that_are_not_there(tmp_path):
    for name in ("none.plan.json", "a\0b.json"):
        with pytest.raises(WinnowError, match="cannot be read"):
            Plan.of(str(tmp_path / name))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(WinnowError, match="cannot be read"):
        Plan.of(str(tmp_path / "folder.json"))


def test_a_file_is_written_whole_under_a_name_that_is_read_again(tmp_path):
    with pytest.raises(WinnowError, match=r"end it in \.plan\.json"):
        write_plan_file(tmp_path / "plan.txt", "fastv", {})
    path = write_plan_file(tmp_path / "a.plan.json", "fastv", {"x": [1]})
    assert json.loads(path.read_text()) == {"winnow_plan": 1, "plan": "fastv", "x": [1]}
    assert list(tmp_path.iterdir()) == [path]
