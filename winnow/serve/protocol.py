"""uvicorn's HTTP protocol with bounds of its own: connections, the time that a head takes, and errors in one shape."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from winnow.serve.errors import ApiError, busy, invalid
from winnow.serve.settings import Settings


class Protocol(H11Protocol):
    """One connection. `bounded` makes the class for a server.

    Class attributes:
        most: connections at once.
        seconds: until the head of a request must have come, from the connection's start or its first byte.
    """

    most: ClassVar[int] = 512
    seconds: ClassVar[float] = 10.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._answer(busy(f"{self.most} connections are open"), 429, b"Too Many Requests")
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()

    def data_received(self, data: bytes) -> None:
        if self._late is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        self._answer(invalid("This is not an HTTP request.", code="invalid_http"), 400, b"Bad Request")

    def _wait(self) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(self.seconds, self._too_late)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        text = "The head of the request did not come in time."
        self._answer(invalid(text, code="request_timeout", status=408), 408, b"Request Timeout")

    def _answer(self, error: ApiError, status: int, phrase: bytes) -> None:
        """Answer outside of any request, and close."""
        if self.transport.is_closing():
            return
        body = json.dumps(error.body()).encode()
        retry = b"" if error.retry is None else b"retry-after: %d\r\n" % error.retry
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n"
        self.transport.write(head % (status, phrase, len(body), retry) + body)
        self.transport.close()


def bounded(connections: int, seconds: float) -> type[Protocol]:
    """The protocol with the bounds of a server."""
    return type("BoundedProtocol", (Protocol,), {"most": connections, "seconds": seconds})


def config_of(app: Any, settings: Settings, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration: within the bounds of the settings, and without logs and headers of its own."""
    return uvicorn.Config(
        app,
        http=bounded(settings.connections, settings.header_seconds),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level=logging.CRITICAL + 1,  # its texts name addresses, and hold tracebacks
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(1, int(settings.header_seconds)),
        h11_max_incomplete_event_size=32 * 1024,
        **options,
    )
