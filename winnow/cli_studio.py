"""`winnow studio`."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli_options import Device, DeviceMap, Dtype, Model, Quantization, Revision, Trust
from winnow.cli_streams import say, warn
from winnow.core.errors import WinnowError

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
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7861,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further Host header to answer.", show_default="the loopback names and --host"),
    ] = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Open a page on this machine: ask about a picture, compare two plans, see what they kept, read a store."""
    if missing := [own for own in NEEDS if find_spec(own) is None]:
        raise WinnowError(f"winnow studio needs {', '.join(missing)}: pip install 'tokenwinnow[studio]'")

    from winnow.serve.listening import listen
    from winnow.studio.stores import Stores, stores_of

    stores = Stores(stores_of(store or [], Path()))
    listener = listen(host, port)  # before torch and the model: a port that is taken costs nothing

    from winnow.core.registry import entries
    from winnow.models.load import load, quiet
    from winnow.serve.settings import LOOPBACK, Settings
    from winnow.studio.answering import Asker
    from winnow.studio.app import Studio
    from winnow.studio.server import run

    quiet()
    if model is None and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)  # the bundled model gains little from more
    loaded, processor = load(
        model, device=device, device_map=device_map, dtype=dtype, quantization=quantization, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    name = model or "the bundled reference model"
    asker = Asker(loaded, processor, name, bundled=model is None)
    settings = Settings(
        name=name,
        hosts=tuple(dict.fromkeys((*LOOPBACK, host.lower(), *(own.lower() for own in allow_host or ())))),
        methods=tuple(entry.slug for entry in entries()),
        waiting=16,
        connections=64,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="winnow: %(message)s")
    key = secrets.token_urlsafe(24)
    run(Studio(settings, asker, stores), key, listener, lambda: _announce(listener, name, host, key))


def _announce(listener: Any, name: str, host: str, key: str) -> None:
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    if host not in ("127.0.0.1", "::1", "localhost"):
        warn("the studio has no TLS: whoever can read this network can read its key and its pictures.")
    say(f"winnow studio asks {name}. Open http://{shown}:{port}/#{key}")
    sys.stdout.flush()
