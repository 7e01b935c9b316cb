"""`winnow bench-serve`."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow import __version__
from winnow.cli_options import Json
from winnow.cli_serve import KEY, NEEDS
from winnow.cli_streams import print_json, say, warn
from winnow.core.errors import WinnowError

MOST_CLIENTS = 512
OWN = ("--host", "--port", "--key-file", "--allow-host", "--name", "--engine", "--grace")  # set by the bench


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("bench-serve", context_settings={"allow_extra_args": True})(bench_serve)


def bench_serve(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(
            help=f"A server of OpenAI's chat completions, with /v1; its key is in the variable {KEY}.",
            show_default="a winnow serve of its own, with the options behind --",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model, as requests say it.", show_default="the first that the server has")
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(
            "--plan",
            help="A plan; full: no compression; server: that of the server. Several: repeat it. The first is what the "
            "others are compared with.",
            show_default="full, and that of winnow.compress",
        ),
    ] = None,
    clients: Annotated[str, typer.Option(help="How many ask at once.")] = "1,2,4,8,16,32,64",
    requests: Annotated[
        int, typer.Option(min=1, max=100_000, help="Under a plan in a round, two for each client at least.")
    ] = 20,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Of all plans at all numbers of clients.")] = 5,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="No round begins that would not end within them.", show_default="none")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Of an answer.")] = 16,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of exactly --max-tokens; vLLM alone can.")
    ] = False,
    start: Annotated[int, typer.Option(min=0, max=2**40, help="The first scene of winnow's world.")] = 0,
    size: Annotated[int, typer.Option(help="Pixels of a scene's side.")] = 224,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 120.0,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="JSON lines; a run that was stopped goes on from them.")
    ] = Path("bench-serve.jsonl"),
    chart: Annotated[Path | None, typer.Option(help="Draw the figures into this .svg or .png.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what --out holds.")] = False,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Measure on a busy machine; nothing is compared then.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a server under load: throughput and latencies against the number of clients, plans interleaved.

    Options behind -- are those of the winnow serve that it starts.
    """
    from winnow.bench.clock import busy
    from winnow.bench.environment import environment
    from winnow.engine.compress import DEFAULT
    from winnow.serve.bench import chart as charts
    from winnow.serve.bench.client import Endpoint
    from winnow.serve.bench.figures import rows
    from winnow.serve.bench.journal import Journal
    from winnow.serve.bench.requests import Asking, server_of
    from winnow.serve.bench.run import Load, Run

    load = Load(tuple(plan or ("full", DEFAULT)), _clients(clients), requests, rounds, start, size)
    if chart is not None:
        charts.check_name(chart)
    reason = busy()
    if reason and not allow_busy:
        raise WinnowError(f"No times from a busy machine: {reason}. Wait, or mark the run with --allow-busy.")
    with _server(url, context.args, max(load.clients)) as (address, key):
        endpoint = Endpoint(address, key, time_limit)
        model = _model(endpoint.models(), name)
        asking = Asking(model["id"], server_of(model), max_tokens, ignore_eos)
        settings = load.settings() | {
            "winnow": __version__, "server": asking.server, "model": asking.model, "url": url,
            "options": list(context.args), "max_tokens": max_tokens, "ignore_eos": ignore_eos, "time_limit": time_limit,
        }  # fmt: skip
        Run(endpoint, asking, load, warn).check()
        journal = Journal(out, settings, environment() | {"busy": reason}, fresh=fresh)
        with _progress(len(load.clients) * rounds, sys.stderr.isatty() and not as_json) as step:
            try:
                Run(endpoint, asking, load, warn, step).measure(journal, minutes)
            except KeyboardInterrupt:
                warn(f"{len(journal.groups)} groups are in {out}; the same command goes on from there.")
                raise
    compared = not journal.about["busy"]
    found = rows(journal.groups, load.plans, gains=compared)
    if chart is not None:
        charts.write_chart(found, chart)
    if as_json:
        print_json({"settings": settings, "about": journal.about, "rows": [row.as_json() for row in found]})
        return
    _show(found)
    if not compared:
        warn(f"nothing is compared, because the machine was busy: {journal.about['busy']}")


def _server(url: str | None, options: Sequence[str], most: int) -> contextlib.AbstractContextManager[tuple[str, str]]:
    """The address and the key of the server that is asked."""
    from importlib.util import find_spec

    from winnow.serve.bench.own_server import own_server

    if url is not None:
        if options:
            raise WinnowError(
                f"{options[0]!r} is for a server that the bench starts; leave out --url, or what is behind --."
            )
        return contextlib.nullcontext((url, os.environ.get(KEY, "")))
    if missing := [own for own in NEEDS if find_spec(own) is None]:
        raise WinnowError(f"winnow serve needs {', '.join(missing)}: pip install 'tokenwinnow[serve]'")
    for option in options:
        if option.partition("=")[0] in OWN:
            raise WinnowError(
                f"{option}: the bench sets it for the server that it starts; start your own, and give --url."
            )
    return own_server(["--method", "full", "--queue", str(max(most, 64)), *options], KEY)


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("groups", total=total)
        yield lambda: bar.advance(task)


def _model(models: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    found = [model for model in models if name in (None, model["id"])]
    if not found:
        raise WinnowError(f"--name {name!r}: the server has {', '.join(model['id'] for model in models)}.")
    return found[0]


def _clients(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= MOST_CLIENTS for part in parts):
        raise WinnowError(f"--clients {text!r}; write numbers such as 1,8,64, at most {MOST_CLIENTS}.")
    return tuple(sorted({int(part) for part in parts}))


def _show(found: Sequence[Any]) -> None:
    from winnow.cli_show import listing

    columns = (
        "clients", "plan", "answers/s", "gain", "first text, ms: p50", "p90", "p99", "end, ms: p50", "p90", "p99",
        "prompt", "answer", "right", "errors",
    )  # fmt: skip
    shown = []
    for row in found:
        errors = ", ".join(f"{count} × {error}" for error, count in row.errors.items())
        times = [_interval(own[p], p == 50) for own in (row.first, row.total) for p in own]
        shown.append(
            (
                str(row.clients), row.plan, _interval(row.throughput), _interval(row.gain, unit="×"), *times,
                f"{row.prompt:.0f}", f"{row.answer:.1f}", f"{row.right.value:.0%}", errors or "0",
            )
        )  # fmt: skip
    listing(columns, shown)
    rounds = sorted({row.rounds for row in found})
    say(f"{' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds; intervals are 95 %, over rounds.")


def _interval(value: Any, whole: bool = True, unit: str = "") -> str:
    if value is None:
        return "–"
    digits = lambda x: f"{x:.{max(0, 2 - int(math.log10(max(x, 1e-3))))}f}"  # noqa: E731
    ends = "" if not whole or math.isnan(value.low) else f" [{digits(value.low)}, {digits(value.high)}]"
    return f"{digits(value.value)}{unit}{ends}"
