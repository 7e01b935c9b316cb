"""A real server process on a free loopback port, and what tests say to it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from winnow import world

ROOT = Path(__file__).resolve().parents[2]
KEY = "key-of-the-tests"
NAME = "winnow-reference"


@dataclass(frozen=True)
class Answer:
    """A status, headers with small letters, and a body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]

    @property
    def error(self) -> dict[str, Any]:
        found = self.json
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        return found["error"]

    @property
    def events(self) -> list[Any]:
        """The JSON of a stream's events; the string [DONE] at the end is None."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in self.body.decode().split("\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        return [None if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]

    @property
    def streamed(self) -> str:
        deltas = [e["choices"][0]["delta"] for e in self.events if e and e.get("choices")]
        return "".join(delta.get("content") or "" for delta in deltas)


class Server:
    """A process of `winnow serve`, or of another program that serves in the same way."""

    words = ("serve", "--port", "0", "--grace", "8")
    greeting = "winnow serves"
    key = KEY

    def __init__(self, folder: Path, *options: str, program: str = "winnow.cli") -> None:
        self.folder = folder
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {
            "WINNOW_API_KEY": KEY,
            "PYTHONPATH": path,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-P", "-m", program, *self.words, *options]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
        )
        self.log: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()
        self.said = self.process.stdout.readline()
        assert self.said.startswith(self.greeting), self.log
        self.port = int(self.said.rpartition(":")[2].partition("/")[0])

    def _listen(self) -> None:
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    def send(self, verb: str, path: str, body: bytes | None = None, timeout: float = 60, **headers: str) -> Answer:
        """One request over a connection of its own; `key=""` sends no key. Other names become headers."""
        given = {"host": f"127.0.0.1:{self.port}", "content-type": "application/json"}
        key = headers.pop("key", self.key)
        given |= {"authorization": f"Bearer {key}"} if key else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.putrequest(verb, path, skip_host=True, skip_accept_encoding=True)
            if body is not None:
                given.setdefault("content-length", str(len(body)))
            for name, value in given.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def chat(self, timeout: float = 60, **fields: Any) -> Answer:
        """A chat request with these fields."""
        return self.send("POST", "/v1/chat/completions", json.dumps({"model": NAME} | fields).encode(), timeout)

    def ask(self, question: str, *pictures: Any, **fields: Any) -> Answer:
        """A question about pictures: PIL's, bytes, or URLs."""
        return self.chat(messages=[user(question, *pictures)], **fields)

    def raw(self, data: bytes, *, shut: bool = False, timeout: float = 20) -> bytes:
        """The answer to bytes, or what came of it before the server closed the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            found = bytearray()
            while not _is_whole(found) and (part := connection.recv(65_536)):
                found += part
            return bytes(found)

    def open(self, **fields: Any) -> http.client.HTTPResponse:
        """A stream that the caller reads and closes."""
        body = json.dumps({"model": NAME, "stream": True} | fields).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        found = connection.getresponse()
        found.socket_to_close = connection  # type: ignore[attr-defined]
        return found

    def memory(self, kind: str = "VmRSS") -> int:
        """Bytes of the process now (VmRSS), or at most so far (VmHWM)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024

    def metric(self, name: str) -> float:
        lines = self.send("GET", "/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        """Until a metric has a value."""
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def ended(self, seconds: float = 30) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def running(folder: Path, *options: str, program: str = "winnow.cli") -> Iterator[Server]:
    """A server that is stopped in the end."""
    server = Server(folder, *options, program=program)
    try:
        yield server
    finally:
        server.stop()


def _is_whole(answer: bytearray) -> bool:
    head, end, body = bytes(answer).partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])


def url(picture: Any) -> str:
    """A picture as a data: URL; a text is taken as it is."""
    if isinstance(picture, str):
        return picture
    if isinstance(picture, Image.Image):
        file = io.BytesIO()
        picture.save(file, "PNG")
        picture = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def user(question: str, *pictures: Any) -> dict[str, Any]:
    """A message of the user, pictures first."""
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url(own)}} for own in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@cache
def drawn(seed: int) -> Any:
    """A scene of winnow's world, with its questions."""
    return world.scene(seed, split="test")


MOTORCYCLE = "is there a motorcycle?"
PATHS = ("site-packages", "/tmp", "/home", "/work", "/usr", ".py")  # noqa: S108 — looked for, not used
FORBIDDEN = (*PATHS, "Traceback", 'File "', "0x", "127.0.0.1", "torch", "PIL")


def check_tells_nothing(answer: Answer) -> None:
    """No path, address, traceback or other library in what an error says."""
    said = answer.body.decode()
    assert not [word for word in FORBIDDEN if word in said], said
