"""The command line: `winnow run`, `bench`, `speed`, `turns`, `report`, `tune`, `serve`, `studio` and others."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from winnow import __version__, cli_bench, cli_bench_serve, cli_serve, cli_stream, cli_studio, cli_tune, cli_world
from winnow.cli_options import (
    Device,
    DeviceMap,
    Dtype,
    Json,
    Keep,
    Model,
    Positions,
    Quantization,
    Revision,
    Trust,
)
from winnow.cli_reference import recall, reference, video
from winnow.cli_streams import flush, forgiving, mistake, print_json, say, warn
from winnow.cli_train import Trainable, frames, toc3d
from winnow.core.errors import WinnowError


class _Group(TyperGroup):
    """Turns a user's mistake into one line on stderr and exit code 2, and Ctrl-C into exit code 130."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            forgiving(stream)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except Exception as error:
            said = mistake(error)
            if said is None:
                raise
        warn(" ".join(said.split()))
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a vision-language model read fewer tokens and keep its answer, and prove both.",
)
train = typer.Typer(cls=Trainable, no_args_is_help=True, help="Train what winnow ships, or its like for your model.")
app.add_typer(train, name="train")
train.command("reference")(reference)
train.command("recall")(recall)
train.command("video")(video)
train.command("toc3d")(toc3d)
train.command("frames")(frames)
cli_bench.register(app)
cli_tune.register(app)
cli_serve.register(app)
cli_bench_serve.register(app)
cli_stream.register(app)
cli_studio.register(app)
cli_world.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"winnow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    picture: Annotated[
        str, typer.Argument(help="A picture, a video, or world:SEED for a scene of the reference world.")
    ],
    question: Annotated[
        str | None, typer.Argument(help="The question; a scene has its own.", show_default=False)
    ] = None,
    model: Model = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="A slug or a plan; give it several times to compare.",
            show_default="that of winnow.compress",
        ),
    ] = None,
    keep: Keep = None,
    positions: Positions = None,
    overlay: Annotated[
        Path | None,
        typer.Option(help="Draw the kept tokens into this picture file; of a video also into an .mp4 or .gif."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--frames", help="Of a video: this many frames, evenly.", show_default="8")
    ] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Of a video: this many frames a second.")] = None,
    keyframes: Annotated[bool, typer.Option("--keyframes", help="Of a video: the frames stored whole.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Length of the answer.")] = 16,
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Timed runs after a warm-up; medians are shown.")] = 3,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer a question about a picture or a video, with and without compression, and say what each answer cost."""
    from winnow import cli_run
    from winnow.bench.clock import busy
    from winnow.cli_clips import load_for
    from winnow.engine.compress import DEFAULT
    from winnow.models.quiet import quiet
    from winnow.watch.clip_inputs import BUNDLED

    quiet()
    wanted = cli_run.plans(method or [DEFAULT], keep, positions)
    paths = cli_run.overlay_paths(overlay, wanted)
    asked = cli_run.subject(picture, question, cli_run.sampling_of(count, fps, keyframes), bundled=model is None)
    cli_run.check_overlays(paths, asked)
    reason = busy()
    films = model is None and asked.video is not None
    loaded, processor = load_for(
        films,
        model,
        device=device,
        device_map=device_map,
        dtype=dtype,
        quantization=quantization,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    warnings = cli_run.warnings(asked) if model is None else []
    if asked.video is not None and asked.video.sampled.broken:
        warnings.append("the video is damaged or cut off, and frames at its end are missing.")
    for warning in warnings:
        warn(f"warning: {warning}")
    result = cli_run.compare(
        loaded, processor, asked, wanted, max_new_tokens=max_new_tokens, runs=runs, picture=overlay
    )
    result = {"winnow": __version__, "model": model or (BUNDLED if films else "bundled reference model"), **result}
    if warnings:
        result["warning"] = " ".join(warnings)
    if reason:
        result["note"] = f"this machine was busy at the start ({reason}): do not rely on the times"
    if as_json:
        print_json(result)
    else:
        from winnow.cli_show import comparison

        comparison(result)


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods that a plan may name."""
    from winnow.core.registry import entries

    found = entries()
    if as_json:
        print_json([dataclasses.asdict(entry) for entry in found])
        return
    from winnow.cli_show import listing

    rows = [(e.slug, ", ".join(e.stages), e.kind, e.family, e.arxiv, e.summary) for e in found]
    listing(("slug", "stages", "kind", "family", "arXiv", "what it does"), rows)


@app.command()
def systems(
    state: Annotated[str | None, typer.Option(help="Only those that are: works, partly or none.")] = None,
    as_json: Json = False,
) -> None:
    """List the published systems that winnow is to contain, and how far the tests prove each of them."""
    from winnow import systems as table

    if state is not None and state not in table.STATES:
        raise WinnowError(f"--state {state!r}; allowed: {', '.join(table.STATES)}.")
    found = [system for system in table.systems() if state in (None, system.state)]
    if as_json:
        print_json([dataclasses.asdict(system) for system in found])
        return
    from winnow.cli_show import listing

    rows = [
        (s.slug + (" ◦" if s.extra else ""), s.family, ", ".join(s.stages), s.kind, s.state, s.arxiv) for s in found
    ]
    listing(("slug", "family", "stages", "kind", "state", "arXiv"), rows)
    counts = ", ".join(f"{sum(s.state == name for s in found)} {name}" for name in table.STATES)
    say(f"{len(found)} systems: {counts}. ◦ is outside the list of 107.")


@app.command()
def families(as_json: Json = False) -> None:
    """List the model classes of transformers: at which points each can be compressed, or why it cannot."""
    from winnow.model_classes import model_classes

    found = model_classes()
    if as_json:
        print_json([dataclasses.asdict(own) for own in found])
        return
    from winnow.cli_show import listing

    rows = [(own.model_type, own.adapter or "–", ", ".join(own.points) or "–", own.reason) for own in found]
    listing(("model type", "adapter", "points", "reason"), rows)
    works = [sum(point in own.points for own in found) for point in ("projected", "layers")]
    say(
        f"{len(found)} classes: {works[0]} at projected, {works[1]} at layers[k]. The generic adapter is checked on "
        "the very model before it is used: pass processor= to winnow.compress."
    )


@app.command()
def doctor(
    model: Model = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Run the engine's own checks on a checkpoint; a failed one names the part of transformers that it suspects."""
    from winnow.engine.doctor import diagnose
    from winnow.models.load import load
    from winnow.models.quiet import quiet

    quiet()
    loaded, processor = load(
        model,
        device=device,
        device_map=device_map,
        dtype=dtype,
        quantization=quantization,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    found = diagnose(loaded, processor)
    if as_json:
        print_json([{"name": check.name, "ok": check.ok, "detail": check.detail} for check in found])
    else:
        from winnow.cli_show import checks

        checks(found)
    if not all(check.ok for check in found):
        raise typer.Exit(1)


def main() -> None:
    """The `winnow` command."""
    try:
        app()
    finally:
        flush()


if __name__ == "__main__":
    main()
