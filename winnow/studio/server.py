"""One studio process: requests until Ctrl-C or a signal."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from winnow.serve.protocol import config_of
from winnow.studio.app import Studio, make_app

GRACE = 2  # seconds that requests in flight have at the end


class Server(uvicorn.Server):
    """uvicorn's server.

    Args:
        ready: is called when the server answers.
    """

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready()


def run(studio: Studio, key: str, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until a signal comes."""
    config = config_of(make_app(studio, key), studio.settings, timeout_graceful_shutdown=GRACE)
    Server(config, ready).run(sockets=[listener])
