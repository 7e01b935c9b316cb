"""`winnow bench`, `winnow speed`, `winnow turns` and `winnow report`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from winnow.cli_options import Device, Dtype, Json, Model, Positions, Trust
from winnow.cli_streams import print_json, say, warn
from winnow.core.errors import WinnowError
from winnow.core.plan_file import names_file

BUDGETS = "128,64,32,16"
LARGEST_BATCH = 4096

StorePath = Annotated[Path, typer.Option(help="The SQLite file of results; a killed sweep goes on from it.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="A slug, to which --keep applies, a plan with its own settings, or a plan file. Several: repeat it; "
        "slugs also as a,b.",
        show_default="all that winnow brings",
    ),
]
Keep = Annotated[str, typer.Option(help="Budgets: content tokens (64) or shares (12.5%).")]
Data = Annotated[
    Path | None,
    typer.Option(help='Your own questions: JSON lines of {"image", "question", "answer"[, "evidence", "type", "id"]}.'),
]
Split = Annotated[str, typer.Option(help="Of winnow's world: train, test or heldout_glyphs.")]
Start = Annotated[int, typer.Option(min=0, help="Of winnow's world: the first scene.")]
Batch = Annotated[int, typer.Option(min=1, help="Questions in a forward; it changes no answer.")]
AnswerLength = Annotated[int | None, typer.Option(min=1, max=4096, help="Length of an answer.", show_default="16")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads.", show_default="torch's choice")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("bench")(bench)
    app.command("speed")(speed)
    app.command("turns")(turns)
    app.command("report")(report)


def bench(
    store: StorePath = Path("runs.sqlite"),
    method: Methods = None,
    keep: Keep = BUDGETS,
    questions: Annotated[
        int | None, typer.Option(min=1, help="How many.", show_default="400 of winnow's world, all of --data")
    ] = None,
    model: Model = None,
    data: Data = None,
    clips: Annotated[
        int | None,
        typer.Option(help="Frames of clips to ask about instead of pictures; the model is then one of `train video`."),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(help="Of questions about clips: presence,order,…", show_default="those the model has learned"),
    ] = None,
    split: Split = "test",
    start: Start = 0,
    baselines: Annotated[
        str, typer.Option(help="Of random, uniform, downsample, ceiling, oracle; random and downsample always run.")
    ] = "random,uniform,downsample,ceiling,oracle",
    batch: Batch = 16,
    processes: Annotated[int, typer.Option(min=1, max=256, help="On a CPU: one for each core to use.")] = 1,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the baselines' draws.")] = 0,
    max_new_tokens: AnswerLength = None,
    positions: Positions = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the store has of this run.")] = False,
    as_json: Json = False,
) -> None:
    """Ask questions with every method at every budget, next to the baselines; results go to a store."""
    from winnow.bench import processes as several
    from winnow.bench.store import Store
    from winnow.models.quiet import quiet

    quiet()
    sweep = several.Sweep(
        str(store), named(method), several.budgets_of(keep), model,
        None if data is None else str(data), questions, split, start,
        several.listed(baselines, "--baselines random,uniform"), batch, seed, max_new_tokens, positions, device, dtype,
        trust_remote_code, threads=threads if threads is not None or processes == 1 else 1, resume=not fresh,
        clips=clips, types=None if types is None else several.listed(types, "--types presence,order"),
    )  # fmt: skip
    run = several.run_all(sweep, processes, progress=sys.stderr.isatty() and not as_json, say=warn)
    with Store(store) as results:
        _print_accuracy(results, run, as_json)


def speed(
    store: StorePath = Path("runs.sqlite"),
    method: Methods = None,
    keep: Keep = "64",
    model: Model = None,
    data: Data = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes.", show_default="1,8,32; on a CPU 1,8")] = None,
    ragged: Annotated[bool, typer.Option(help="Also 8 questions of unequal lengths in a padded batch.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before them.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=2, max=4096, help="Length of every answer.")] = 8,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Time on a busy machine; no speed-up is printed then.")
    ] = False,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time every method next to the full model and to the model that is fed as few tokens (native-M)."""
    from winnow.bench import processes as several
    from winnow.bench import speed as timing
    from winnow.bench.store import Store
    from winnow.models.quiet import quiet

    quiet()
    sweep = several.Sweep(
        str(store), named(method), several.budgets_of(keep), model,
        None if data is None else str(data), 64, device=device, dtype=dtype, trust_remote_code=trust_remote_code,
        threads=threads,
    )  # fmt: skip
    loaded, processor = sweep.loaded()
    on_gpu = loaded.device.type == "cuda"
    sizes = _sizes(batches) if batches is not None else timing.BATCHES if on_gpu else timing.BATCHES[:2]
    with Store(store, create=True) as results:
        run = timing.speed(
            loaded, processor, sweep.methods, sweep.budgets, sweep.task(loaded), results,
            name=model or "bundled reference model", sizes=sizes, ragged=ragged, repeats=repeats, warm_up=warm_up,
            new_tokens=new_tokens, allow_busy=allow_busy, progress=sys.stderr.isatty() and not as_json,
        )  # fmt: skip
        _print_speed(results, run, as_json)


def turns(
    plan: Annotated[list[str], typer.Option("--plan", help="A plan that reads the text. Several: repeat it.")],
    pairs: Annotated[int, typer.Option(min=1, help="Scenes, each with two questions.")] = 200,
    split: Split = "test",
    start: Start = 0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask two questions about each scene in turns, with the first selection kept, and with it made again."""
    import dataclasses

    from winnow.bench.runner import bar
    from winnow.bench.tasks import world_turns
    from winnow.bench.turns import ask_in_turns
    from winnow.models.load import load
    from winnow.models.quiet import quiet

    quiet()
    loaded, processor = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    side = getattr(getattr(loaded.config, "vision_config", None), "image_size", 224)
    asked = world_turns(pairs, split=split, seed=start, size=336 if isinstance(side, int) and side > 224 else 224)
    with bar(len(asked) * (2 * len(plan) + 1), sys.stderr.isatty() and not as_json) as step:
        found = ask_in_turns(loaded, processor, plan, asked, step=step)
    if as_json:
        print_json([dataclasses.asdict(row) for row in found])
        return
    from winnow.cli_show import listing

    rows = [
        (
            row.plan or "full", row.turns or "–", str(row.first), str(row.second), str(row.change or "–"),
            f"{row.recall:.2f}", f"{row.read:.0f}",
        )
        for row in found
    ]  # fmt: skip
    columns = ("plan", "turns", "first question", "second question", "change", "evidence recall", "tokens read")
    listing(columns, rows)


def report(
    store: Annotated[Path, typer.Argument(help="The store that `winnow bench` and `winnow speed` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    pictures: Annotated[Path | None, typer.Option(help="Where the pictures of --data are, for the overlays.")] = None,
) -> None:
    """Write one self-contained HTML page: curves with intervals, tables, pictures of what was kept."""
    from winnow.bench.report import write_report

    for path in write_report(store, out, pictures=pictures):
        say(path)


def named(values: Sequence[str] | None) -> tuple[str, ...]:
    """The slugs and plans of `--method`, in order; default: every method that winnow brings.

    Commas part slugs; a value with a `:`, `+` or `|` is one plan, whose settings have commas of their own.
    """
    if not values:
        from winnow.core.registry import picture_methods

        return tuple(entry.slug for entry in picture_methods() if entry.family != "user")
    found: list[str] = []
    for value in values:
        found += [value] if any(mark in value for mark in ":+|") or names_file(value) else value.split(",")
    found = [name.strip() for name in found]
    if not all(found):
        raise WinnowError(f"--method {','.join(values)!r} has an empty name; `winnow methods` lists the slugs.")
    return tuple(found)


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= LARGEST_BATCH for part in parts):
        raise WinnowError(f"--batches {text!r}; write sizes such as 1,8,32, at most {LARGEST_BATCH}.")
    return tuple(map(int, parts))


def _print_accuracy(store: Any, run: str, as_json: bool) -> None:
    from winnow.bench.summary import accuracy_table, summarise

    rows = summarise(store, run)
    if as_json:
        print_json({"run": run, "cells": [row.as_json() for row in rows]})
        return
    from winnow.cli_show import listing

    listing(*accuracy_table(rows))
    say(f"Run {run} in {store.path}. Next: winnow report {shlex.quote(str(store.path))} -o report.html")


def _print_speed(store: Any, run: str, as_json: bool) -> None:
    import dataclasses

    from winnow.bench.speed import lines
    from winnow.bench.summary import speed_table

    found = lines(store, run)
    if as_json:
        about = store.run(run).environment
        content = {"run": run, "environment": about, "lines": [dataclasses.asdict(line) for line in found]}
        print_json(content)
        return
    from winnow.cli_show import listing

    listing(*speed_table(found))
    if reason := store.run(run).environment.get("busy"):
        warn(f"no speed-up is shown, because the machine was busy: {reason}")
