"""What `winnow serve` and `winnow studio` share: what they need, where they listen, and which hosts they answer."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated

import typer

from winnow.core.errors import WinnowError

Host = Annotated[str, typer.Option(help="The address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(help="A further Host header to answer.", show_default="the loopback names and --host"),
]


def check_installed(command: str, packages: Sequence[str]) -> None:
    """Refuse a command whose extra, which has its name, is not installed."""
    if missing := [own for own in packages if find_spec(own) is None]:
        raise WinnowError(f"winnow {command} needs {', '.join(missing)}: pip install 'tokenwinnow[{command}]'")


def answered_hosts(host: str, others: Sequence[str] | None) -> tuple[str, ...]:
    """The Host headers that are answered: the loopback names, and those that were given."""
    from winnow.serve.settings import LOOPBACK

    return tuple(dict.fromkeys((*LOOPBACK, host.lower(), *(own.lower() for own in others or ()))))


def address(host: str, port: int) -> str:
    """A host and a port as an URL has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
