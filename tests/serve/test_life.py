"""Clients that leave, full queues, faults of the device, signals: rows W5 to W8, W16 and W17."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.process import KEY, MOTORCYCLE, ROOT, Answer, Server, check_tells_nothing, drawn, running, user
from serve.slow import DEVICE_LOST, FAILS_LATE, OUT_OF_MEMORY, STEP
from winnow.cli import app

SLOW = {"program": "serve.slow"}
ASKED = {"messages": [user(MOTORCYCLE, drawn(54).image)]}


@pytest.fixture(scope="module")
def slow(tests_importable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("slow")
    with running(folder, "--method", "hiprune:keep=64", "--batch", "2", "--queue", "2", **SLOW) as server:
        yield server
        assert server.process.poll() is None, server.log


def good(server: Server) -> None:
    answer = server.chat(**ASKED, max_tokens=1)
    assert (answer.status, answer.text) == (200, "yes")


def read_chunks(response: Any, count: int) -> list[bytes]:
    return [line for line in (response.readline() for _ in range(2 * count)) if line.strip()]


def test_W5_a_stream_whose_client_leaves_stops_within_a_step(slow: Server) -> None:
    left = slow.metric("winnow_clients_left_total")
    response = slow.open(**ASKED, max_tokens=1000)
    assert len(read_chunks(response, 3)) == 3
    response.close()
    response.socket_to_close.close()
    start = time.monotonic()
    slow.wait_for("winnow_requests_running", 0, seconds=5)
    assert time.monotonic() - start < 1 + 3 * STEP  # of the 30 seconds that the answer would take
    slow.wait_for("winnow_clients_left_total", left + 1)
    good(slow)


def test_W5_a_client_that_leaves_before_its_answer(slow: Server) -> None:
    with pytest.raises(TimeoutError):
        slow.chat(timeout=1, **ASKED, max_tokens=1000)
    slow.wait_for("winnow_requests_running", 0, seconds=5)
    good(slow)


def test_W5_a_client_that_leaves_a_batch_leaves_the_others_as_they_are(slow: Server) -> None:
    alone = slow.chat(**ASKED, max_tokens=40)
    blocked = slow.open(**ASKED, max_tokens=20)
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(slow.chat, **ASKED, max_tokens=40)
        leaves = slow.open(**ASKED, max_tokens=1000)
        leaves.close()
        leaves.socket_to_close.close()
        assert stays.result().text == alone.text
    blocked.read()


def test_W5_clients_that_leave_at_once_cost_no_slot(slow: Server) -> None:
    for _ in range(30):
        response = slow.open(**ASKED, max_tokens=1000)
        response.socket_to_close.close()
        response.close()
    slow.wait_for("winnow_requests_running", 0)
    slow.wait_for("winnow_requests_waiting", 0)
    with ThreadPoolExecutor(4) as pool:  # all slots are free again
        answers = list(pool.map(lambda _: slow.chat(**ASKED, max_tokens=2).status, range(4)))
    assert answers == [200] * 4


def test_W7_memory_that_runs_out_costs_one_request(slow: Server) -> None:
    blocked = slow.open(**ASKED, max_tokens=20)  # so that the next two are one batch
    with ThreadPoolExecutor(2) as pool:
        bad, other = (pool.submit(slow.chat, **ASKED, max_tokens=n) for n in (OUT_OF_MEMORY, 3))
        blocked.read()
        answer = bad.result()
        assert other.result().json["usage"]["completion_tokens"] == 3
    assert (answer.status, answer.error["code"]) == (503, "out_of_memory")
    assert "retry-after" in answer.headers
    assert "secret" not in answer.body.decode()
    good(slow)


def test_W16_an_error_behind_the_first_chunk_is_an_event_and_the_end(slow: Server) -> None:
    response = slow.open(**ASKED, max_tokens=FAILS_LATE)
    events = Answer(response.status, {"content-type": response.headers["content-type"]}, response.read()).events
    assert response.status == 200
    assert len(events) > 2
    assert set(events[-1]) == {"error"}
    assert events[-1]["error"]["code"] == "internal_error"
    assert all("error" not in event for event in events[:-1])
    whole = slow.chat(**ASKED, max_tokens=FAILS_LATE)
    check_tells_nothing(whole)
    assert (whole.status, whole.error["code"]) == (500, "internal_error")
    assert "RuntimeError in winnow.serve.engine" in "\n".join(slow.log)
    assert "secret" not in "\n".join(slow.log)
    good(slow)


def test_W8_a_full_queue_says_when_to_come_back(slow: Server) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: slow.chat(**ASKED, max_tokens=20), range(12)))
    statuses = [answer.status for answer in answers]
    assert statuses.count(200) >= 4  # two in a batch, two that wait
    assert set(statuses) == {200, 429}
    for answer in answers:
        if answer.status == 429:
            assert answer.error["code"] == "busy"
            assert int(answer.headers["retry-after"]) >= 1
    good(slow)


def test_W8_a_thousand_clients(slow: Server) -> None:
    good(slow)
    before = slow.memory("VmHWM")
    with ThreadPoolExecutor(100) as pool:
        statuses = list(pool.map(lambda _: slow.chat(**ASKED, max_tokens=1).status, range(1000)))
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 4
    assert slow.memory("VmHWM") - before < 100 * 2**20
    good(slow)


def test_W8_connections_without_end_are_refused(tests_importable: None, slow: Server) -> None:
    held = []
    try:
        for _ in range(520):
            held.append(socket.create_connection(("127.0.0.1", slow.port), timeout=10))
        assert b"429 Too Many Requests" in held[-1].recv(1000)
    finally:
        for own in held:
            own.close()
    time.sleep(0.2)
    good(slow)


def test_W6_requests_in_flight_end_and_a_second_signal_cuts_them(tests_importable: None, tmp_path: Path) -> None:
    with running(tmp_path, "--method", "hiprune:keep=64", "--grace", "60", **SLOW) as server:
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(server.chat, **ASKED, max_tokens=60)
            endless = server.open(**ASKED, max_tokens=1000)
            server.wait_for("winnow_requests_running", 2)
            server.signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(OSError, match="refused"):  # nothing new is taken
                socket.create_connection(("127.0.0.1", server.port), timeout=2)
            assert whole.result().json["usage"]["completion_tokens"] == 60
        server.signal(signal.SIGTERM)
        assert b'"code": "stopping"' in endless.read()
        assert server.ended() == 0


def test_W6_the_grace_ends(tests_importable: None, tmp_path: Path) -> None:
    with running(tmp_path, "--method", "hiprune:keep=64", "--grace", "1", **SLOW) as server:
        stream = server.open(**ASKED, max_tokens=1000)  # 30 seconds
        read_chunks(stream, 2)
        server.signal(signal.SIGINT)
        assert b'"code": "stopping"' in stream.read()
        assert server.ended() == 0


def test_W7_a_device_that_is_lost_ends_the_process(tests_importable: None, tmp_path: Path) -> None:
    with running(tmp_path, "--method", "hiprune:keep=64", **SLOW) as server:
        answer = server.chat(**ASKED, max_tokens=DEVICE_LOST)
        check_tells_nothing(answer)
        assert answer.status in (500, 503)
        assert server.ended() == 3


def refused(*options: str, **environment: str) -> str:
    """What `winnow serve` says when it does not start."""
    done = CliRunner().invoke(app, ["serve", "--port", "0", *options], env={"WINNOW_API_KEY": KEY} | environment)
    assert done.exit_code == 2, (done.output, done.exception)
    assert "Traceback" not in done.output
    return " ".join(done.stderr.split())


def test_W17_a_port_that_is_taken_is_told_by_the_process_before_anything_is_loaded() -> None:
    given = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "WINNOW_API_KEY": KEY}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "winnow.cli",
            "serve",
            "--port",
            str(taken.getsockname()[1]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=given)
    assert done.returncode == 2
    assert "give another --port" in done.stderr
    assert "Traceback" not in done.stderr
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


REFUSED = [
    (["--model", "no/such-model"], "There is no checkpoint"),
    (["--device", "cuda:99"], "give cpu, or cuda where there is a GPU"),
    (["--", "--tensor-parallel-size", "2"], "only --engine vllm takes more than options"),
    (["--engine", "other"], "allowed: winnow, vllm"),
    (["--method", "nonsense"], "Unknown method"),
    (["--allow", "nonsense"], "Unknown method"),
    (["--max-keep", "0"], "keeps nothing"),
    (["--key-file", "/nonexistent"], "holds no key"),
    (["--host", "no.such.host.invalid"], "Cannot listen"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_W17_options_that_cannot_be_met_are_refused(options: list[str], said: str) -> None:
    assert said in refused(*options)


def test_W17_a_short_key_is_refused() -> None:
    assert "at least 8 characters" in refused(WINNOW_API_KEY="short")


def test_W17_nothing_reads_the_wall_clock_to_measure() -> None:
    """Clocks that jump change no time-out: durations come from the monotonic clock and the event loop."""
    found = [
        path.name
        for path in (ROOT / "winnow" / "serve").glob("*.py")
        if "time.time()" in path.read_text(encoding="utf-8")
    ]
    assert sorted(found) == ["app.py", "replies.py"]  # `created`, which is a date
