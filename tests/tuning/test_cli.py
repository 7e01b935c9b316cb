"""The command, as a user gives it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from winnow.cli import app
from winnow.core.plan import Plan


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tests.bench.conftest import _built

    folder = tmp_path_factory.mktemp("checkpoint")
    for part in _built():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def call(checkpoint, tmp_path, steady):
    def invoke(*options):
        given = ["--model", checkpoint, "--device", "cpu", "--store", tmp_path / "t.sqlite", "--questions", 12]
        given += ["--method", "fastervlm", "--keep", "32", "--max-new-tokens", 2, "-o", tmp_path / "my.plan.json"]
        return CliRunner().invoke(app, ["tune", *map(str, given), *map(str, options)])

    return invoke


def test_a_plan_is_printed_and_written(call, tmp_path):
    result = call("--kv", "1MB")
    assert result.exit_code == 0, result.output
    assert "the plan" in result.stdout
    assert "10.00 ms to the first token" in result.stdout
    assert f"Written to {tmp_path / 'my.plan.json'}" in " ".join(result.stdout.split())
    assert "round 1 of 1" in result.stderr
    assert str(Plan.of(str(tmp_path / "my.plan.json"))) in result.stdout


def test_json_says_the_same_and_nothing_else_is_on_stdout(call, tmp_path):
    result = call("--kv", "1MB", "--json")
    found = json.loads(result.stdout)
    assert found["key"] == json.loads((tmp_path / "my.plan.json").read_text())["plan"]
    assert found["limits"] == {"kv_bytes": 1_000_000}
    assert [row["verdict"] for row in found["finalists"]].count("the plan") == 1


def test_without_a_plan_the_exit_code_is_one_and_nothing_is_written(call, tmp_path):
    result = call("--kv", "1kB")
    assert result.exit_code == 1, result.output
    assert "No plan is proven" in result.stderr
    assert not (tmp_path / "my.plan.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "No limit was given"),
        (("--lose", "all"), "lose='all'"),
        (("--lose", "1%", "-o", "plan.txt"), "plan.txt is not the name of a plan file"),
        (("--lose", "1%", "--method", "nonesuch"), "nonesuch"),
        (("--lose", "1%", "--confidence", "2"), "confidence=2"),
        (("--lose", "1%", "--held-out", "1"), "held_out=1"),
        (("--lose", "1%", "--keep", "1,,2"), "Cannot read"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_two(call, options, said):
    result = call(*options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
