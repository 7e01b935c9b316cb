"""The table of systems: complete, agreeing with the registry, and written from test reports alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from winnow import list_methods
from winnow.core.registry import built_in
from winnow.systems import BUILDS_NEEDED, families, prove, systems

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "systems.py"


def test_every_row_is_there_once():
    rows = systems()
    assert Counter(row.extra for row in rows) == {False: 107, True: 42}
    assert len({row.slug for row in rows}) == 149
    # VisPruner and FasterVLM are versions of one paper, and Expected Attention is that of kvpress.
    assert len({row.arxiv for row in rows}) == 147
    assert list(families()) == list("ABCDEFGHI")
    assert {row.family for row in rows} == set(families())
    for row in rows:
        assert row.name
        assert row.stages
        assert len(row.arxiv) == 10
        assert row.arxiv[:4].isdigit()


def test_no_fact_stands_twice():
    """Family, stages and kind stand in the table, and the source of a method in the first line of its file alone."""
    table = json.loads((ROOT / "winnow" / "data" / "systems.json").read_text(encoding="utf-8"))["systems"]
    methods = built_in()
    for row in table:
        assert ("arxiv" in row) != (row["slug"] in methods), row["slug"]
    assert set(methods) <= {row["slug"] for row in table}
    for slug, entry in methods.items():
        source = (ROOT / "winnow" / "methods" / f"{entry.module.rpartition('.')[2]}.py").read_text(encoding="utf-8")
        assert source.count(entry.arxiv) == 1, f"{slug}: its source stands once, in the first line"
        (call,) = [line for line in source.splitlines() if line.startswith("@") and "register(" in line]
        assert call.endswith(f'register("{slug}")'), f"{slug}: what the table says is not said again"


@pytest.mark.parametrize("entry", list_methods(), ids=lambda entry: entry.slug)
def test_a_method_says_of_itself_what_the_table_says(entry):
    row = next((row for row in systems() if row.slug == entry.slug), None)
    if entry.family == "user":
        pytest.skip("a method of another distribution has no row")
    assert row is not None, f"{entry.slug} is not in winnow/data/systems.json"
    assert (entry.family, entry.kind, entry.arxiv) == (row.family, row.kind, row.arxiv)


TWO = ["llava_clip", "qwen2_5_vl"]


@pytest.mark.parametrize(
    ("checks", "state"),
    [
        ({}, "none"),
        ({"exact": ["a"]}, "partly"),
        ({"model": TWO}, "partly"),
        ({"exact": ["a"], "directional": ["b"]}, "partly"),
        ({"exact": ["a"], "directional": ["b"], "model": TWO[:1]}, "partly"),
        ({"exact": ["a"], "model": TWO}, "partly"),
        ({"directional": ["a"], "model": TWO}, "partly"),
        ({"exact": ["a"], "directional": ["b"], "model": TWO}, "works"),
    ],
)
def test_a_system_works_only_with_all_three_kinds_of_evidence(checks, state):
    assert BUILDS_NEEDED == 2
    assert prove(checks) == state


TESTS = """
import pytest

@pytest.mark.system("fastervlm", "exact")
def test_exact(): pass

@pytest.mark.system("fastervlm", "directional")
def test_directional(): assert {holds}

@pytest.mark.system("fastervlm", "model")
@pytest.mark.parametrize("build", ["one", "two"])
def test_model(build): pass

@pytest.mark.system("divprune", "exact")
def test_skipped(): pytest.skip("has a reason")

@pytest.mark.system("hiprune", "exact")
def test_broken_teardown(request): request.addfinalizer(lambda: 1 / 0)

def test_unmarked(): pass
"""


def run_pytest(folder: Path, body: str, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Run tests in a folder of their own with this suite's conftest, and read the report."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  system(slug, check, build=None): x\n")
    (folder / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "--system-report", "out/report.json", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=_environment())
    report = folder / "out" / "report.json"
    return done, json.loads(report.read_text()) if report.exists() else {}


def _environment() -> dict[str, str]:
    import os

    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return {**inherited, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_the_report_holds_what_passed_and_nothing_else(tmp_path, options):
    done, report = run_pytest(tmp_path, TESTS.replace("{holds}", "True"), *options)
    assert done.returncode == 1, "the test whose teardown breaks fails"
    assert set(report) == {"fastervlm"}
    assert report["fastervlm"]["model"] == ["one", "two"]
    assert [len(report["fastervlm"][kind]) for kind in ("exact", "directional")] == [1, 1]


def test_a_failed_check_is_no_evidence(tmp_path):
    _, report = run_pytest(tmp_path, TESTS.replace("{holds}", "False"))
    assert set(report["fastervlm"]) == {"exact", "model"}


@pytest.mark.parametrize(
    "mark", ['"no-such-system", "exact"', '"fastervlm", "vibes"', '"fastervlm", "model"', '"fastervlm"']
)
def test_a_mark_that_cannot_be_read_stops_the_run(tmp_path, mark):
    done, _ = run_pytest(tmp_path, f"import pytest\n@pytest.mark.system({mark})\ndef test_it(): pass\n")
    assert done.returncode == 4
    assert "mark.system" in done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of what `tools/systems.py` reads and writes."""
    for name in ("tools/systems.py", "README.md", "docs/systems.md", "winnow/data/state.json"):
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text())
    return tmp_path


def tool(checkout: Path, verb: str, report: dict) -> subprocess.CompletedProcess:
    (checkout / "report.json").write_text(json.dumps(report))
    command = [sys.executable, "tools/systems.py", verb, "report.json"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60, env=_environment())


WORKS = {"fastervlm": {"exact": ["a"], "directional": ["b"], "model": TWO}, "fastv": {"exact": ["c"]}}


def test_the_table_is_written_from_the_report_and_checked_against_it(checkout):
    assert tool(checkout, "write", WORKS).returncode == 0
    state = json.loads((checkout / "winnow/data/state.json").read_text())
    assert {slug: row["state"] for slug, row in state.items()} == {"fastervlm": "works", "fastv": "partly"}
    table = (checkout / "docs/systems.md").read_text()
    assert "1 works, 1 partly, 147 none, of 149" in table
    assert "| `fastervlm` | works | ✔ | ✔ |" in (checkout / "README.md").read_text()
    assert tool(checkout, "check", WORKS).returncode == 0


def test_a_test_that_fails_makes_the_check_fail(checkout):
    tool(checkout, "write", WORKS)
    weaker = {**WORKS, "fastervlm": {"exact": ["a"], "model": TWO}}
    done = tool(checkout, "check", weaker)
    assert done.returncode == 1
    assert "make systems" in done.stderr


def test_a_table_edited_by_hand_makes_the_check_fail(checkout):
    tool(checkout, "write", WORKS)
    path = checkout / "docs/systems.md"
    path.write_text(path.read_text().replace("– |", "✔ works |", 1))
    assert tool(checkout, "check", WORKS).returncode == 1


def test_the_tool_says_what_it_needs(checkout):
    assert tool(checkout, "write", {"no-such-system": {}}).returncode == 2
    done = subprocess.run(
        [sys.executable, "tools/systems.py", "check", "nowhere.json"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
        env=_environment(),
    )
    assert done.returncode == 2
    assert "make test" in done.stderr
