"""tools/upstream.py, on tests that stand in for those of transformers: what is alike, what is refused, what differs."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Three tests with a tiny LLaVA: one that ends alike, one that is refused under a plan, and one that finds the plan.
STANDING_IN = f"""
import sys

sys.path.insert(0, {str(ROOT / "tests")!r})
import zoo

INPUTS = zoo.inputs("llava_clip", ("3 A 6", "11"))


def made():
    plain = zoo.model("llava_clip")
    return type(plain)(plain.config).eval()


def test_alike():
    made()(**INPUTS)


def test_static():
    made().generate(**INPUTS, max_new_tokens=2, cache_implementation="static")


def test_seen():
    assert "save_pretrained" not in vars(made())
"""
pytestmark = pytest.mark.xdist_group("upstream")  # the two runs are made once, by one worker
NOTHING = {"plans": {}, "reduced": 0, "refused": {}}


@pytest.fixture(scope="module")
def upstream():
    """The module; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("upstream", ROOT / "tools" / "upstream.py")
    made = importlib.util.module_from_spec(spec)
    sys.modules["upstream"] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def runs(upstream, tmp_path_factory):
    """The plain run and the one under a plan, of the tests above."""
    folder = tmp_path_factory.mktemp("checkout")
    file = folder / "test_modeling_standing_in.py"
    file.write_text(STANDING_IN, encoding="utf-8")
    return [upstream.run(folder, [file.name], attach, folder / f"{attach}.jsonl", ()) for attach in (False, True)]


@pytest.mark.full  # two whole runs of pytest
def test_it_attaches_and_finds_what_differs(upstream, runs):
    plain, planned = runs
    name = "test_modeling_standing_in.py::test_"
    assert {test.removeprefix(name): own.outcome for test, own in plain.outcomes.items()} == dict.fromkeys(
        ("alike", "static", "seen"), "passed"
    )
    assert planned.outcomes[f"{name}alike"].reduced
    assert not plain.outcomes[f"{name}alike"].reduced
    assert upstream.differing(plain, planned) == [f"{name}seen", f"{name}static"]
    refusals = tomllib.loads(upstream.REFUSALS.read_text())["refusal"]
    assert upstream.known(planned.outcomes[f"{name}static"], refusals) == "static cache"
    assert upstream.known(planned.outcomes[f"{name}seen"], refusals) is None


def test_a_test_that_fails_by_something_else_as_well_is_no_refusal(upstream):
    refusals = [{"name": "no", "message": "no, say …"}]
    refused, other = ({"outcome": "failed", "refusal": text, "error": "", **NOTHING} for text in ("no, say x", ""))
    outcome = upstream.Outcome()
    outcome.add(refused)
    assert upstream.known(outcome, refusals) == "no"
    outcome.add(other)
    assert upstream.known(outcome, refusals) is None


def test_refusals_are_explained_where_users_look(upstream):
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for refusal in tomllib.loads(upstream.REFUSALS.read_text())["refusal"]:
        assert refusal.keys() == {"name", "message", "why"}
        assert refusal["message"] in page
