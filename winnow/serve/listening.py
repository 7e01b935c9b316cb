"""The socket of a server, taken before anything is loaded."""

from __future__ import annotations

import socket

from winnow.core.errors import WinnowError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        WinnowError: the port is taken, or the host is not of this machine.
    """
    problem = ""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
        return found
    except (OSError, OverflowError) as error:
        problem = getattr(error, "strerror", None) or type(error).__name__
    raise WinnowError(f"Cannot listen on {host}, port {port} ({problem}); give another --port or --host.")
