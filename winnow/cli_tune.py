"""`winnow tune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli_bench import AnswerLength, Batch, Data, Methods, Split, Start, Threads, named
from winnow.cli_options import Device, Dtype, Json, Model, Positions, Trust
from winnow.cli_streams import print_json, say, warn


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("tune")(tune)


def tune(
    lose: Annotated[
        str | None, typer.Option(help="Answers that may be lost, as a share of all: 1%.", show_default="no limit")
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(help="Milliseconds from the pixels to the first token: 40.", show_default="no limit"),
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Bytes of the KV cache behind a prompt: 2MB.", show_default="no limit")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan file to write.")] = Path("tuned.plan.json"),
    store: Annotated[
        Path, typer.Option(help="The SQLite file of answers and times; a stopped search goes on from it.")
    ] = Path("tune.sqlite"),
    method: Methods = None,
    keep: Annotated[
        str, typer.Option(help="Budgets to begin with: content tokens (64) or shares (12.5%).")
    ] = "50%,25%,12.5%,6.25%",
    positions: Positions = None,
    questions: Annotated[
        int | None, typer.Option(min=2, help="How many.", show_default="1600 of winnow's world, all of --data")
    ] = None,
    model: Model = None,
    data: Data = None,
    split: Split = "test",
    start: Start = 0,
    held_out: Annotated[float, typer.Option(help="Share of the questions that only the check sees.")] = 0.5,
    confidence: Annotated[float, typer.Option(help="With which the plan keeps --lose.")] = 0.95,
    batch: Batch = 16,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split into search and check.")] = 0,
    max_new_tokens: AnswerLength = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the store has of this search.")] = False,
    as_json: Json = False,
) -> None:
    """Find the plan that is fastest within a limit, check it on questions held out, and write it to a plan file."""
    from winnow.bench import processes as several
    from winnow.core.plan_file import checked_name
    from winnow.models.quiet import quiet
    from winnow.tuning.limits import Limits
    from winnow.tuning.search import QUESTIONS
    from winnow.tuning.search import tune as search

    quiet()
    Limits.of(lose, prefill, kv)  # before anything is loaded
    checked_name(out)
    budgets = several.budgets_of(keep)
    sweep = several.Sweep(
        str(store), named(method) if method else (), budgets, model, None if data is None else str(data),
        questions if data is not None else questions or QUESTIONS, split, start, max_new_tokens=max_new_tokens,
        device=device, dtype=dtype, trust_remote_code=trust_remote_code, threads=threads,
    )  # fmt: skip
    loaded, processor = sweep.loaded()
    found = search(
        loaded, processor, sweep.task(loaded), lose=lose, prefill_ms=prefill, kv_bytes=kv, methods=sweep.methods,
        keep=budgets, positions=positions, confidence=confidence, held_out=held_out, store=store,
        name=model or "bundled reference model", batch=batch, max_new_tokens=sweep.answer_length(), seed=seed,
        resume=not fresh, progress=sys.stderr.isatty() and not as_json, say=warn,
    )  # fmt: skip
    written = None if found.plan is None else found.save(out)
    if as_json:
        print_json(found.as_json() | {"file": None if written is None else str(written)})
    else:
        _print(found, written)
    if written is None:
        raise typer.Exit(1)


def _print(found: Any, written: Path | None) -> None:
    from winnow.cli_show import listing

    listing(*found.table())
    say(
        f"Full model: {found.full_ms:.2f} ms to the first token. {found.tried} plans were tried. Shares of time that "
        f"differ by less than {found.resolution:.3f} count as equal."
    )
    if busy := found.about["machine"]["busy"]:
        warn(f"the machine was busy, so times may be off although all plans shared its load: {busy}")
    if written is None:
        warn(found.why_none)
    else:
        say(f"{found.plan}\n  {found.limits}; confidence {found.confidence:.3g}. Written to {written}.")
