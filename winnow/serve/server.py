"""One server process: requests until a signal, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from winnow.serve.app import Service, make_app
from winnow.serve.errors import where
from winnow.serve.protocol import config_of

log = logging.getLogger("winnow.serve")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SLACK = 5.0  # seconds that an end takes beyond the grace: one step of the model, and the last bytes
BROKEN = 3  # exit code: the device has failed, a supervisor should start a new process


class Server(uvicorn.Server):
    """uvicorn's server, which here ends with exit code 0 on a signal, after the requests in flight or their grace.

    Args:
        ready: is called when the server answers.
    """

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.ready = service, ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Take nothing more; let requests in flight end within the grace. Called again: cut them now."""
        if self.service.draining:
            self.service.engine.cut()
            return
        self.service.draining = self.should_exit = True
        asyncio.get_running_loop().call_later(self.service.settings.grace, self.service.engine.cut)


def serve(service: Service, keys: list[str], listener: socket.socket, ready: Callable[[], None]) -> int:
    """Answer requests until a signal comes.

    Returns:
        The exit code: 0, or BROKEN.
    """
    settings = service.settings
    grace = int(settings.grace + SLACK)
    config = config_of(make_app(service, keys), settings, timeout_graceful_shutdown=grace)
    server = Server(config, service, ready)
    asyncio.run(_run(server, listener))
    service.engine.close(SLACK)
    return BROKEN if service.engine.broken else 0


async def _run(server: Server, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: _log(context))

    def broken() -> None:
        loop.call_soon_threadsafe(server.stop)

    server.service.engine.on_broken = broken
    server.service.engine.start()
    await server.serve([listener])


def _log(context: dict[str, Any]) -> None:
    error = context.get("exception")
    log.error("- %s", where(error) if error is not None else "a fault in the event loop")
