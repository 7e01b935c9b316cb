"""One request to a server, streamed, with the times at which its answer began and ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from winnow.core.errors import WinnowError

LONGEST = 2**20  # bytes of a line, or of what a server says of an error


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        first, total: milliseconds from the start of the request, its connection included, to the first text of the
            answer and to its end.
        prompt, answer: tokens of each, as the server counts them.
        kept: tokens of the picture that compression left; None where the server does not say.
        reason: why the answer ended, in OpenAI's words.
        error: what went wrong, in a few words, and `told`, what the server said of it; empty where nothing did.
    """

    first: float = 0.0
    total: float = 0.0
    prompt: int = 0
    answer: int = 0
    kept: int | None = None
    text: str = ""
    reason: str = ""
    error: str = ""
    told: str = ""


class Endpoint:
    """A server, by the address under which clients of OpenAI find it.

    Args:
        url: with the version, as in http://127.0.0.1:8000/v1.
        key: sent with each request where it is not empty.
        seconds: that a request may take.
    """

    def __init__(self, url: str, key: str = "", seconds: float = 120.0) -> None:
        problem = ""
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname, parts.port
        except ValueError as error:
            problem = f" ({error})"
        if problem or parts.scheme not in ("http", "https") or not self.host or parts.query or parts.username:
            raise WinnowError(f"--url {url!r}{problem}; write it as clients do, such as http://127.0.0.1:8000/v1.")
        self.url, self.path, self.seconds = url, parts.path.rstrip("/"), seconds
        self.kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._open: set[socket.socket] = set()
        self._changing = threading.Lock()
        self._closed = False

    def models(self) -> list[dict[str, Any]]:
        """What the server says of the models that it has.

        Raises:
            WinnowError: nothing answers there, or it answers something else.
        """
        problem = ""
        try:
            with self._connection() as connection:
                connection.request("GET", f"{self.path}/models", headers=self.headers)
                answer = connection.getresponse()
                if answer.status == 200:
                    found = json.loads(answer.read(LONGEST))["data"]
                    if found and all(isinstance(own["id"], str) for own in found):
                        return found
                problem = "another answer than a list of models" if answer.status == 200 else _status(answer)[0]
        except (OSError, http.client.HTTPException) as error:
            problem = type(error).__name__
        except (ValueError, KeyError, TypeError):
            problem = "another answer than a list of models"
        raise WinnowError(
            f"No server of OpenAI's chat completions at {self.url} ({problem}); give the address that its clients "
            "use, and its key in WINNOW_API_KEY."
        )

    def ask(self, body: bytes) -> Outcome:
        """Send a request for a stream, and read it to its end. Nothing is raised: an error is an outcome."""
        start = time.perf_counter()
        try:
            with self._connection() as connection:
                connection.request("POST", f"{self.path}/chat/completions", body, self.headers)
                answer = connection.getresponse()
                if answer.status == 200:
                    return self._read(answer, start)
                error, told = _status(answer)
        except TimeoutError:
            error, told = "timeout", ""
        except (OSError, http.client.HTTPException) as fault:
            error, told = f"connection: {type(fault).__name__}", ""
        except (ValueError, LookupError, TypeError, AttributeError):
            error, told = "an answer that is no stream of chat completions", ""
        return Outcome(total=_since(start), error=error, told=told)

    def close(self) -> None:
        """End all requests now."""
        with self._changing:
            self._closed = True
            for held in self._open:
                with contextlib.suppress(OSError):
                    held.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = self.kind(self.host or "", self.port, timeout=self.seconds)
        with contextlib.closing(connection):
            connection.connect()
            held = connection.sock  # the connection forgets it where the server says that this answer is the last
            with self._changing:
                if self._closed:
                    raise ConnectionAbortedError
                self._open.add(held)
            try:
                yield connection
            finally:
                with self._changing:
                    self._open.discard(held)

    def _read(self, answer: http.client.HTTPResponse, start: float) -> Outcome:
        first, text, reason = 0.0, "", ""
        usage: dict[str, Any] = {}
        while line := answer.readline(LONGEST):
            if time.perf_counter() - start > self.seconds:
                raise TimeoutError
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                return _outcome(first, _since(start), text, reason, usage)
            event = json.loads(line[5:])
            if "error" in event:
                return Outcome(total=_since(start), error=_code(event), told=_message(event))
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                reason = choice.get("finish_reason") or reason
                if not first and (piece or reason):
                    first = _since(start)
                text += piece
            usage = event.get("usage") or usage
        return Outcome(total=_since(start), error="the stream was cut")


def _outcome(first: float, total: float, text: str, reason: str, usage: dict[str, Any]) -> Outcome:
    if not first or not usage:
        return Outcome(total=total, error="no usage in the stream" if first else "no answer in the stream")
    kept = (usage.get("winnow") or {}).get("kept")
    return Outcome(first, total, usage["prompt_tokens"], usage["completion_tokens"], kept, text, reason)


def _since(start: float) -> float:
    return 1000 * (time.perf_counter() - start)


def _status(answer: http.client.HTTPResponse) -> tuple[str, str]:
    """The status of an answer with the code of its error, and what the server says of it."""
    try:
        said = json.loads(answer.read(LONGEST))
    except ValueError:
        said = {}
    return f"{answer.status} {_code(said)}".strip(), _message(said)


def _code(said: Any) -> str:
    error = said.get("error") if isinstance(said, dict) else None
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _message(said: Any) -> str:
    error = said.get("error") if isinstance(said, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else ""
