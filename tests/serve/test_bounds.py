"""Bounds of time, connections and bytes, in this process and with short times: a real server waits for 10 s."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from winnow.serve.body import Buffered, read_body
from winnow.serve.errors import ApiError
from winnow.serve.guard import Guard
from winnow.serve.protocol import bounded
from winnow.serve.settings import Settings

KEY = "key-of-the-tests"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers at once, and one that takes its time."""
    if scope["path"] == "/slow":
        await asyncio.sleep(60)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    if scope["path"] == "/stalls":
        await asyncio.sleep(60)
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server with two connections, a head within 0.3 seconds, and 0.5 seconds for a request."""
    app = Guard(hello, Settings(name="x", seconds=0.5), [KEY])
    config = uvicorn.Config(app, http=bounded(2, 0.3), ws="none", lifespan="off", log_level=100, timeout_keep_alive=1)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65_536):
        found += part
    return found


def ask(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n\r\n".encode()


def code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize("first", [b"", b"G", b"GET / HTTP/1.1\r\nhost: loc"])
def test_W2_a_head_that_does_not_come(port: int, first: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(first)
        assert code(read_all(connection)) == (408, "request_timeout")


def test_W2_a_head_that_drips(port: int) -> None:
    start = time.monotonic()
    with connect(port) as connection, contextlib.suppress(OSError):
        for _ in range(100):
            connection.sendall(b"a")
            time.sleep(0.05)
    assert time.monotonic() - start < 4  # it is closed long before five seconds


def test_W2_a_second_request_has_its_own_time(port: int) -> None:
    with connect(port) as connection:
        for _ in range(3):
            connection.sendall(ask("/"))
            answer = b""
            while not answer.endswith(b"hello"):
                answer += connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.2)


def test_W8_connections_beyond_the_bound(port: int) -> None:
    with connect(port) as one, connect(port) as two, connect(port) as three:
        assert code(read_all(three)) == (429, "busy")
        for own in (one, two):
            own.sendall(ask("/"))
            assert own.recv(65_536).startswith(b"HTTP/1.1 200")


def test_a_request_that_takes_too_long(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(ask("/slow"))
        assert code(read_all(connection)) == (503, "timeout")
    with connect(port) as connection:  # its answer has begun: it is cut
        connection.sendall(ask("/stalls"))
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"hello" not in answer


class Body:
    """A request whose body comes in parts, one after each pause."""

    def __init__(self, part: bytes, pause: float = 0.0, **headers: str) -> None:
        self.part, self.pause, self.headers = part, pause, {"content-type": "application/json"} | headers

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.pause)
        return {"type": "http.request", "body": self.part, "more_body": True}


def refused(sent: Body, buffered: Buffered, **bounds: Any) -> tuple[int, str | None]:
    async def read() -> None:
        with buffered.share() as share:
            await read_body(sent, Settings(name="x", **bounds), share)  # type: ignore[arg-type]

    with pytest.raises(ApiError) as raised:
        asyncio.run(read())
    assert buffered.held == 0
    return raised.value.status, raised.value.code


def test_W2_a_body_that_drips() -> None:
    assert refused(Body(b"x", 0.02), Buffered(1000), body_seconds=0.2) == (408, "request_timeout")


def test_W2_a_body_without_end() -> None:
    assert refused(Body(b"x" * 100), Buffered(10_000), body=1000) == (413, "request_too_large")


def test_W8_bodies_that_are_too_many_together() -> None:
    buffered = Buffered(1000)
    with buffered.share() as others:
        others.take(900)
        assert buffered.held == 900

        async def read() -> None:
            with buffered.share() as share:
                await read_body(Body(b"x" * 30), Settings(name="x"), share)  # type: ignore[arg-type]

        with pytest.raises(ApiError) as raised:
            asyncio.run(read())
        assert (raised.value.status, raised.value.retry) == (429, 1)
        assert buffered.held == 900
    assert buffered.held == 0
