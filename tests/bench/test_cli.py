"""The commands, as a user gives them."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from winnow.bench.processes import budgets_of, listed, methods_of
from winnow.bench.store import Store
from winnow.cli_bench import register
from winnow.core.errors import WinnowError
from winnow.core.registry import picture_methods


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from .conftest import _built

    folder = tmp_path_factory.mktemp("checkpoint")
    for part in _built():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def call(checkpoint, tmp_path):
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)

    def invoke(command, *options, **kwargs):
        given = [
            command,
            "--store",
            str(tmp_path / "r.sqlite"),
            "--model",
            str(checkpoint),
            "--device",
            "cpu",
            *options,
        ]
        return CliRunner().invoke(app, given, **kwargs)

    return invoke


COMMON = (
    *("--method", "fastervlm", "--method", "fastv:layer=1,keep=10%"),
    *("--keep", "16,12.5%", "--questions", "6"),
)


def test_bench_prints_a_line_for_each_cell_and_says_what_is_next(call, tmp_path):
    result = call("bench", *COMMON, "--baselines", "random", "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    labels = [row[0] for row in rows[1:-1]]
    assert labels.count("fastervlm") == labels.count("random-M") == labels.count("downsample-M") == 2
    assert labels[0] == "full"
    assert labels.count("fastv:keep=10%,layer=1") == 1
    assert rows[-1][:1] == ["Run"]
    assert "winnow report" in result.stdout
    with Store(tmp_path / "r.sqlite") as store:
        assert rows[-1][1] == store.runs()[0].key


def test_bench_prints_json_that_says_the_same(call, tmp_path):
    result = call("bench", *COMMON, "--max-new-tokens", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    cells = {(row["cell"]["label"], row["cell"]["budget"]): row for row in found["cells"]}
    assert cells["full", ""]["agreement"] == 1
    assert cells["full", ""]["flops"] == cells["full", ""]["kv"] == 1
    assert 0 < cells["fastervlm", "16"]["flops"] < 1
    assert cells["fastervlm", "16"]["accuracy"]["n"] == 6
    assert cells["oracle", "16"]["recall"] >= cells["random-M", "16"]["recall"]


def test_bench_asks_the_questions_of_a_data_file_and_names_bad_rows(call, tmp_path):
    from winnow.world import export

    lines = export(tmp_path / "scenes", 1, seed=2)
    with lines.open("a") as file:
        file.write("{}\n")
    result = call("bench", "--method", "fastervlm", "--keep", "16", "--data", str(lines), "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output
    assert "left out: line" in result.stderr
    assert "its image is None" in result.stderr


def test_speed_prints_times_and_on_a_busy_machine_no_speed_up(call, monkeypatch):
    from winnow.bench import speed as timing

    monkeypatch.setattr(timing, "busy", lambda device="cpu": "the neighbours")
    options = (
        "--method",
        "fastervlm",
        "--keep",
        "16",
        "--batches",
        "1",
        "--no-ragged",
        "--repeats",
        "2",
        "--warm-up",
        "0",
    )
    refused = call("speed", *options)
    assert isinstance(refused.exception, WinnowError)
    result = call("speed", *options, "--allow-busy", "--new-tokens", "2")
    assert result.exit_code == 0, result.output
    assert "the neighbours" in result.stderr
    assert {line.split()[0] for line in result.stdout.splitlines()} >= {"full", "native-M", "downsample-M", "fastervlm"}
    assert "×" not in result.stdout


def test_lists_are_taken_apart_at_commas_and_all_methods_are_measured_by_default():
    assert listed("64, 12.5%", "") == ("64", "12.5%")
    with pytest.raises(WinnowError, match="Cannot read '64,,32'; write a list such as --keep 128,64,32"):
        budgets_of("64,,32")
    plans = ["fastv:layer=2,keep=10%", "todre"]
    assert methods_of(plans) == tuple(plans)
    assert methods_of(None) == tuple(e.slug for e in picture_methods() if e.module.startswith("winnow.methods."))


def test_the_commands_import_no_torch():
    import subprocess
    import sys

    code = "import sys, typer, winnow.cli_bench as c; c.register(typer.Typer()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
