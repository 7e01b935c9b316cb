"""`winnow serve`."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli_listen import AllowHost, Host, Port, address, answered_hosts, check_installed
from winnow.cli_options import Device, DeviceMap, Dtype, Keep, Model, Positions, Quantization, Revision, Trust, opened
from winnow.cli_streams import say, warn
from winnow.core.errors import WinnowError

KEY = "WINNOW_API_KEY"
CONTEXT = 4096  # of models that do not say how long their prompts may be
DECODING = 20.0  # seconds that a video may take, while other requests are not read
NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("serve", context_settings={"allow_extra_args": True})(serve)


def serve(
    context: typer.Context,
    model: Model = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A slug, a plan or a plan file for requests that bring none; full: no compression.",
            show_default="that of winnow.compress",
        ),
    ] = None,
    keep: Keep = None,
    positions: Positions = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Slugs that a request's plan may name; none: no request brings a plan.",
            show_default="the training-free methods of pictures",
        ),
    ] = None,
    min_keep: Annotated[str, typer.Option(help="The least that a request's plan may keep of a picture.")] = "1",
    max_keep: Annotated[str, typer.Option(help="The most that a request's plan may keep of a picture.")] = "100%",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[
        str | None, typer.Option(help="Of the model, as requests say it.", show_default="from --model")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help=f"A file with a key on each line; else the variable {KEY}.", show_default="a new key, printed"
        ),
    ] = None,
    allow_host: AllowHost = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of requests that say none; 0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    max_context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of messages and answer, before compression.", show_default="the model's"),
    ] = None,
    max_pictures: Annotated[int, typer.Option(min=1, max=64, help="Of a request.")] = 8,
    frames: Annotated[int, typer.Option(min=1, max=64, help="Of a video, evenly.")] = 8,
    max_body: Annotated[int, typer.Option(min=1, max=1024, help="MiB of a request.")] = 32,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Requests that are decoded together.")] = 8,
    queue: Annotated[int, typer.Option(min=1, max=10_000, help="Requests that wait beside them.")] = 64,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600.0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that requests in flight have after SIGTERM.")] = 20.0,
    engine: Annotated[str, typer.Option(help="winnow; or vllm: its own server, with winnow as a plug-in.")] = "winnow",
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer OpenAI's chat completions about pictures, each request compressed by the server's plan or its own.

    With --engine vllm, what stands behind -- is for vLLM.
    """
    if engine == "vllm":
        _serve_by_vllm(context)
        return
    _check_engine(engine, context.args)
    check_installed("serve", NEEDS)

    from winnow.core.budget import Budget
    from winnow.serve.listening import listen

    keys, bounds, called = _keys(key_file), (Budget(min_keep), Budget(max_keep)), name or _name(model)
    listener = listen(host, port)  # before torch and the model: a port that is taken costs nothing

    from winnow.cli_run import plans
    from winnow.engine.compress import DEFAULT
    from winnow.models.quiet import quiet
    from winnow.serve.server import serve as answer
    from winnow.serve.settings import MIB, Settings
    from winnow.serve.start import context_of, make_service
    from winnow.video import VideoLimits

    quiet()
    plan, methods = plans([method or DEFAULT], keep, positions)[0], _allowed(allow)
    loaded, processor = opened(
        model, device=device, device_map=device_map, dtype=dtype, quantization=quantization, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    settings = Settings(
        name=called,
        hosts=answered_hosts(host, allow_host), methods=methods, least=bounds[0], most=bounds[1],
        context=max_context or context_of(loaded) or CONTEXT,
        max_tokens=max_tokens, temperature=temperature, pictures=max_pictures, body=max_body * MIB,
        frames=frames, video=VideoLimits(max_bytes=max_body * MIB, max_frames=frames, timeout=DECODING),
        buffered=max(8, max_body) * 8 * MIB, batch=batch, waiting=queue, seconds=time_limit, grace=grace,
    )  # fmt: skip
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="winnow: %(message)s")
    logging.getLogger("winnow.serve").setLevel(logging.INFO)
    service = make_service(loaded, processor, plan, settings)
    if code := answer(service, keys, listener, lambda: _announce(listener, called, str(plan))):
        warn("the device failed, and only a new process can use it again.")
        raise typer.Exit(code)


def _check_engine(engine: str, extra: list[str]) -> None:
    if engine != "winnow":
        raise WinnowError(f"--engine {engine!r}; allowed: winnow, vllm.")
    if extra:
        raise WinnowError(f"{extra[0]!r}: only --engine vllm takes more than options, and passes it on to vLLM.")


def _serve_by_vllm(context: typer.Context) -> None:
    """vLLM's own server, with the plug-in."""
    from winnow.serve.vllm.launch import check_installed, launch

    given: dict[str, Any] = context.params
    version = check_installed()
    if given["model"] is None:
        raise WinnowError(
            "--engine vllm needs a --model: the bundled one has narrower heads than vLLM's attention on CPUs takes."
        )

    from winnow.core.budget import Budget
    from winnow.serve.vllm.command import Served, arguments

    keys = _keys(given["key_file"])
    served = Served(
        model=given["model"],
        name=given["name"] or _name(given["model"]),
        host=given["host"], port=given["port"],
        plan=_plan_text(given["method"], given["keep"], given["positions"]),
        plans=_allowed(given["allow"] or ["none"]),
        least=Budget(given["min_keep"]), most=Budget(given["max_keep"]),
        temperature=given["temperature"],
    )  # fmt: skip
    by_user = {name for name in given if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    found = arguments(served, {name: given[name] for name in by_user}, context.args)
    warn(f"starts vLLM {version} as this command would: vllm serve {shlex.join(found)}")
    launch(found, keys)


def _plan_text(method: str | None, keep: str | None, positions: str | None) -> str:
    """The plan as the plug-in reads it: a text that names no policy of positions means the one that vLLM has."""
    from winnow.cli_run import plans
    from winnow.core.plan_file import names_file
    from winnow.engine.compress import DEFAULT

    spec = method or DEFAULT
    plan = plans([spec], keep, positions)[0]
    said = positions or (plan.positions if names_file(spec) or "positions=" in spec else None)
    text = str(plan)
    if said is None or "positions=" in text:
        return text
    return f"{text}{',' if '|' in text else ' | '}positions={said}"


def _announce(listener: Any, name: str, plan: str) -> None:
    say(f"winnow serves {name} under {plan} at http://{address(*listener.getsockname()[:2])}/v1")
    sys.stdout.flush()


def _keys(file: Path | None) -> list[str]:
    """The keys of clients: from a file, the environment, or made now and printed."""
    if file is not None:
        problem = ""
        try:
            found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            found, problem = [], f" ({getattr(error, 'strerror', None) or 'it is not UTF-8'})"
        if not found:
            raise WinnowError(f"--key-file {file} holds no key{problem}; write one on each line.")
    elif os.environ.get(KEY):
        found = [os.environ[KEY]]
    else:
        found = [secrets.token_urlsafe(24)]
        warn(f"no --key-file and no {KEY}: the key of this run is {found[0]}")
    if any(not re.fullmatch(r"[!-~]{8,}", key) for key in found):
        raise WinnowError("A key has at least 8 characters, all of them printable ASCII without blanks.")
    return found


def _allowed(given: list[str] | None) -> tuple[str, ...]:
    """Slugs that requests may name."""
    from winnow.core.registry import method_class, picture_methods

    if given is None:
        return tuple(entry.slug for entry in picture_methods() if entry.kind == "training-free")
    slugs = [slug.strip() for own in given for slug in own.split(",") if slug.strip()]
    if slugs == ["none"]:
        return ()
    for slug in slugs:
        method_class(slug)
    return tuple(dict.fromkeys(slugs))


def _name(model: str | None) -> str:
    """What requests call a model: a Hub id as it is, a folder by its own name."""
    if model is None:
        return "winnow-reference"
    return Path(model).resolve().name if Path(model).exists() else model
