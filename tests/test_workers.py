"""How tests are spread over workers: those of a file go to one of them, and those of a group."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BODY = """
import pytest

@pytest.mark.parametrize("i", range(6))
def test_own(i): pass

@pytest.mark.xdist_group("shared")
@pytest.mark.parametrize("i", ["x", "@"])
def test_shared(i): pass
"""


def test_a_file_and_a_group_go_to_one_worker(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    for name in "abcd":
        (tmp_path / f"test_{name}.py").write_text(BODY)
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    given["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=given)
    ran = re.findall(r"\[(gw\d)\] \[ *\d+%\] PASSED (test_(\w).py::test_(\w+)\[.*\]) *$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len({name for _, name, _, _ in ran}) == 4 * 8
    workers = defaultdict(set)
    for worker, _, file, kind in ran:
        workers["shared" if kind == "shared" else file].add(worker)
    assert [len(own) for own in workers.values()] == [1] * 5
    assert len(set.union(*workers.values())) == 2
