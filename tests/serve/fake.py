"""A server of chat completions that answers as a test says, to see what the bench makes of it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Lists one model, or none where it has no owner, and hands each chat request to the test."""

    owner: str
    say: Say

    def do_GET(self) -> None:
        self.whole(200, {"data": [{"id": "fake", "owned_by": self.owner}] if self.owner else []})

    def do_POST(self) -> None:
        type(self).say(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def whole(self, status: int, value: Any) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()

    def event(self, value: Any) -> None:
        self.wfile.write(b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n")
        self.wfile.flush()

    def text(self, piece: str, reason: str | None = None) -> None:
        self.event({"choices": [{"delta": {"content": piece}, "finish_reason": reason}]})

    def end(self, prompt: int = 10, answer: int = 2) -> None:
        self.event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": answer}})
        self.event(b"[DONE]")

    def log_message(self, *_: Any) -> None:
        pass


def answer(handler: Handler, text: str = "yes", first: float = 0.0, later: float = 0.0, prompt: int = 10) -> None:
    """A good answer, whose first text comes after some seconds, and whose end some seconds behind it."""
    handler.begin()
    handler.text("")  # the role alone, as servers begin
    time.sleep(first)
    handler.text(text)
    time.sleep(later)
    handler.text("", "stop")
    handler.end(prompt)


@contextlib.contextmanager
def fake(say: Say, owner: str = "winnow") -> Iterator[str]:
    """Its address, while the context lasts."""
    kind = type("Own", (Handler,), {"say": staticmethod(say), "owner": owner})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
