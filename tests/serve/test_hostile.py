"""Hostile requests of all kinds at once: no crash, nothing told, memory bounded, the next good request right."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.hostile import KINDS, good
from serve.process import FORBIDDEN, Answer, Server, running

EVERY = 25  # one request in so many is good


def run(server: Server, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each kind was answered with each status, and what was told that must not be."""
    told: list[str] = []
    send = server.send

    def watched(*args: object, **options: object) -> Answer:
        answer = send(*args, **options)  # type: ignore[arg-type]
        if answer.status >= 400:
            told.extend(word for word in FORBIDDEN if word in answer.body.decode())
        return answer

    def one(number: int) -> str:
        draw = random.Random(f"{seed} {number}")
        if number % EVERY == 0:
            assert good(server, draw) == (200, "yes")
            return "good 200"
        kind = draw.choice(KINDS)
        return f"{kind.__name__} {kind(server, draw)}"

    server.send = watched  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(8) as pool:
            return Counter(pool.map(one, range(count))), told
    finally:
        del server.send


def check(server: Server, count: int, seed: int) -> None:
    run(server, 300, seed + 1)  # what is imported or made once is there before memory is measured
    before, start = server.memory(), time.monotonic()
    found, told = run(server, count, seed)
    seconds, after, most = time.monotonic() - start, server.memory(), server.memory("VmHWM")
    statuses = Counter[int]()
    for name, times in found.items():
        statuses[int(name.split()[1])] += times
    sizes = " → ".join(f"{size / 2**20:.0f}" for size in (before, after))
    print(f"\n{count} requests, {seconds:.0f} s; RSS {sizes} MiB, at most {most / 2**20:.0f}")
    print(dict(sorted(statuses.items())))
    for name, times in sorted(found.items()):
        print(f"{times:6d} {name}")
    assert told == []
    assert not [status for status in statuses if status >= 500]
    assert found["good 200"] == -(-count // EVERY)
    assert after - before < 64 * 2**20
    assert most - before < 256 * 2**20
    assert not re.search("|".join(map(re.escape, FORBIDDEN)), "\n".join(server.log))
    assert "internal" not in "\n".join(server.log)


def test_three_hundred_hostile_requests(server: Server) -> None:
    check(server, 300, seed=1)


@pytest.mark.full
def test_ten_thousand_hostile_requests(tmp_path: Path) -> None:
    with running(tmp_path, "--method", "hiprune:keep=64", "--max-body", "4", "--max-keep", "128") as server:
        check(server, 10_000, seed=2)
        assert server.process.poll() is None
        server.signal()
        assert server.ended() == 0
    assert list(tmp_path.iterdir()) == []
