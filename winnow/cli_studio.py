"""`winnow studio`."""

from __future__ import annotations

import logging
import secrets
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli_listen import AllowHost, Host, Port, address, answered_hosts, check_installed
from winnow.cli_options import Device, DeviceMap, Dtype, Model, Quantization, Revision, Trust, opened
from winnow.cli_streams import say, warn

NEEDS = ("starlette", "uvicorn", "jinja2", "matplotlib")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("studio")(studio)


def studio(
    model: Model = None,
    store: Annotated[
        list[Path] | None,
        typer.Option(
            help="A store of winnow bench that the page may open. Several: repeat it.",
            show_default="the *.sqlite files of this folder",
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 7861,
    allow_host: AllowHost = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Open a page on this machine: ask about a picture, compare two plans, see what they kept, read a store."""
    check_installed("studio", NEEDS)

    from winnow.serve.listening import listen
    from winnow.studio.stores import Stores, stores_of

    stores = Stores(stores_of(store or [], Path()))
    listener = listen(host, port)  # before torch and the model: a port that is taken costs nothing

    from winnow.core.registry import entries
    from winnow.models.quiet import quiet
    from winnow.serve.settings import Settings
    from winnow.studio.answering import Asker
    from winnow.studio.app import Studio
    from winnow.studio.server import run

    quiet()
    loaded, processor = opened(
        model, device=device, device_map=device_map, dtype=dtype, quantization=quantization, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    name = model or "the bundled reference model"
    asker = Asker(loaded, processor, name, bundled=model is None)
    settings = Settings(
        name=name,
        hosts=answered_hosts(host, allow_host),
        methods=tuple(entry.slug for entry in entries()),
        waiting=16,
        connections=64,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="winnow: %(message)s")
    key = secrets.token_urlsafe(24)
    run(Studio(settings, asker, stores), key, listener, lambda: _announce(listener, name, host, key))


def _announce(listener: Any, name: str, host: str, key: str) -> None:
    if host not in ("127.0.0.1", "::1", "localhost"):
        warn("the studio has no TLS: whoever can read this network can read its key and its pictures.")
    say(f"winnow studio asks {name}. Open http://{address(host, listener.getsockname()[1])}/#{key}")
    sys.stdout.flush()
