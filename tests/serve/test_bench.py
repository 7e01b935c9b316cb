"""`winnow bench-serve` on real servers: one at an address, and one that it starts itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.process import KEY, ROOT, Server
from winnow.cli import app

PLANS = ("--plan", "server", "--plan", "divprune:keep=32")
SMALL = ("--clients", "1,2", "--requests", "2", "--rounds", "2", "--allow-busy", "--json")


def bench(*options: str, code: int = 0) -> Any:
    """What the command prints, or what it says where it is refused."""
    done = CliRunner().invoke(app, ["bench-serve", *options], env={"WINNOW_API_KEY": KEY})
    assert done.exit_code == code, (done.output, done.exception)
    assert "Traceback" not in done.output
    return json.loads(done.stdout) if code == 0 else " ".join(done.stderr.split())


def test_a_server_at_an_address(server: Server, tmp_path: Path) -> None:
    at = ("--url", f"http://127.0.0.1:{server.port}/v1", "--out", str(tmp_path / "run.jsonl"))
    before = server.metric("winnow_answer_seconds_count")
    found = bench(*at, *PLANS, *SMALL, "--chart", str(tmp_path / "chart.svg"))
    checks, warm, asked = 2, 2 * 2, 2 * 2 * (2 + 4)
    assert server.metric("winnow_answer_seconds_count") - before == checks + warm + asked
    rows = {(row["clients"], row["plan"]): row for row in found["rows"]}
    assert list(rows) == [(1, "server"), (1, "divprune:keep=32"), (2, "server"), (2, "divprune:keep=32")]
    for (clients, plan), row in rows.items():
        assert row["requests"] == 2 * 2 * clients
        assert row["errors"] == {}
        assert row["kept"] == (64 if plan == "server" else 32)
        assert row["right"]["value"] > 0.3  # the model knows these scenes
        assert 0 < row["first"]["p50"][0] <= row["total"]["p50"][0] < 60_000
        assert row["throughput"][1] <= row["throughput"][0] <= row["throughput"][2]
    for clients in (1, 2):
        assert rows[clients, "server"]["prompt"] - rows[clients, "divprune:keep=32"]["prompt"] == 32
    assert "divprune" in (tmp_path / "chart.svg").read_text()

    first = (tmp_path / "run.jsonl").read_bytes()
    assert len(first.splitlines()) == 1 + 4
    more = bench(*at, *PLANS, *SMALL, "--rounds", "3")
    assert (tmp_path / "run.jsonl").read_bytes().startswith(first)
    assert [row["rounds"] for row in more["rows"]] == [3] * 4
    assert "another max_tokens" in bench(*at, *PLANS, *SMALL, "--max-tokens", "3", code=2)


def test_what_a_server_refuses_is_told(server: Server, tmp_path: Path) -> None:
    at = ("--url", f"http://127.0.0.1:{server.port}/v1", "--out", str(tmp_path / "run.jsonl"), *SMALL)
    assert "plan full (400 invalid_plan: winnow.plan keeps 256 of the 256" in bench(*at, code=2)
    assert "(400 invalid_plan" in bench(*at, "--plan", "nonsense", code=2)
    assert "the server has winnow-reference" in bench(*at, *PLANS, "--name", "gpt", code=2)
    assert "--ignore-eos" in bench(*at, *PLANS, "--ignore-eos", code=2)
    done = CliRunner().invoke(app, ["bench-serve", *at, *PLANS], env={"WINNOW_API_KEY": "another-key"})
    assert done.exit_code == 2
    assert "401 invalid_api_key" in done.stderr


REFUSED = [
    (("--clients", "0"), "write numbers such as"),
    (("--clients", "1,many"), "write numbers such as"),
    (("--url", "http://127.0.0.1:9/v1"), "No server of OpenAI's chat completions"),
    (("--url", "http://127.0.0.1:9/v1", "--", "--batch", "4"), "'--batch' is for a server that the bench starts"),
    (("--", "--port", "8000"), "--port: the bench sets it"),
    (("--", "--max-keep", "0"), "winnow serve did not start: keep=0 keeps nothing"),
    (("--chart", "a.pdf"), ".svg or .png"),
    (("--plan", "full", "--plan", "full"), "give each once"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[own[1] for own in REFUSED])
def test_options_that_cannot_be_met_are_refused(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in bench("--allow-busy", "--out", str(tmp_path / "a"), *options, code=2)
    assert not (tmp_path / "a").exists()


def test_a_busy_machine_is_not_measured_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.bench.clock.busy", lambda: "somebody else works")
    assert "No times from a busy machine: somebody else works" in bench("--out", str(tmp_path / "a"), code=2)


def started(*options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *options],
        env=environment,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )


def children(process: int) -> list[int]:
    return [int(x) for own in Path(f"/proc/{process}/task").glob("*/children") for x in own.read_text().split()]


def test_a_server_of_its_own_ends_with_ctrl_c_and_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    command = ("winnow.cli", "bench-serve", "--allow-busy", "--json", "--out", str(out), "--clients", "2")
    command += ("--requests", "4", "--plan", "full", "--plan", "hiprune:keep=64")
    process = started(*command, "--rounds", "500", "--", "--batch", "2")
    try:
        end = time.monotonic() + 120
        while not (out.exists() and len(out.read_bytes().splitlines()) > 2):
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < end
            time.sleep(0.1)
        own = children(process.pid)
        assert len(own) == 1
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command goes on from there" in said
    assert not Path(f"/proc/{own[0]}").exists()
    measured = len(out.read_bytes().splitlines()) - 1
    done = bench(*command[2:], "--rounds", "1", "--", "--batch", "2")
    assert [row["plan"] for row in done["rows"]] == ["full", "hiprune:keep=64"]
    assert {row["rounds"] for row in done["rows"]} == {measured}
    assert all(row["errors"] == {} and row["requests"] == 4 * measured for row in done["rows"])
    assert [row["kept"] for row in done["rows"]] == [256, 64]


def test_a_child_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    """Whatever command it is in; this one loads no model and does not end by itself."""
    child = started("winnow.cli_child", "world", "export", str(tmp_path / "many"), "-n", "1000000")
    assert child.stdin is not None
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("many/*.png")):
            assert child.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        child.stdin.close()
        assert child.wait(10) == 1
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
