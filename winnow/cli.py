"""The command line: `winnow run`, `bench`, `speed`, `turns`, `report`, `tune`, `serve`, `studio` and others."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from winnow import __version__, cli_bench, cli_serve, cli_stream, cli_studio, cli_tune
from winnow.cli_options import Device, DeviceMap, Dtype, Json, Model, Positions, Quantization, Revision, Trust
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
world = typer.Typer(
    no_args_is_help=True, help="The reference world: drawn scenes whose questions carry their evidence."
)
train = typer.Typer(cls=Trainable, no_args_is_help=True, help="Train what winnow ships, or its like for your model.")
app.add_typer(world, name="world")
app.add_typer(train, name="train")
train.command("toc3d")(toc3d)
train.command("frames")(frames)
cli_bench.register(app)
cli_tune.register(app)
cli_serve.register(app)
cli_stream.register(app)
cli_studio.register(app)


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
    keep: Annotated[
        str | None, typer.Option(help="Visual tokens to keep: 64, 0.25 or 25%.", show_default="as the method says")
    ] = None,
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
    import torch

    from winnow import cli_run
    from winnow.bench.clock import busy
    from winnow.cli_clips import load_for
    from winnow.engine.compress import DEFAULT
    from winnow.models.load import quiet
    from winnow.watch.clip_inputs import BUNDLED

    quiet()
    wanted = cli_run.plans(method or [DEFAULT], keep, positions)
    paths = cli_run.overlay_paths(overlay, wanted)
    asked = cli_run.subject(picture, question, cli_run.sampling_of(count, fps, keyframes), bundled=model is None)
    cli_run.check_overlays(paths, asked)
    reason = busy()
    if model is None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the bundled model gains little from more, and loses much when a core is taken
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
    from winnow.models.load import load, quiet

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


Count = Annotated[int, typer.Option("--count", "-n", min=1, help="How many scenes.")]
Size = Annotated[int, typer.Option(help="Pixels of a side.")]
Split = Annotated[str, typer.Option(help="train, test or heldout_glyphs.")]
Seed = Annotated[int, typer.Option(help="Of the first scene.")]


@world.command("show")
def world_show(
    sheet: Annotated[Path, typer.Argument(help="The PNG to write.")],
    count: Count = 20,
    size: Size = 224,
    split: Split = "test",
    seed: Seed = 0,
    boxes: Annotated[bool, typer.Option("--boxes", help="Outline the evidence of each question.")] = False,
) -> None:
    """Draw scenes and their questions on one sheet."""
    from winnow.world.export import show

    say(show(sheet, count, size, split, seed, boxes=boxes))


@world.command("export")
def world_export(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    count: Count = 20,
    size: Size = 224,
    split: Split = "test",
    seed: Seed = 0,
) -> None:
    """Write scenes as PNG files, and their questions with answers and evidence as JSON lines."""
    from winnow.world.export import export

    say(export(folder, count, size, split, seed))


@world.command("clip")
def world_clip(
    film: Annotated[Path, typer.Argument(help="The .mp4 or .gif to write.")],
    seed: Annotated[int, typer.Option(help="Of the clip.")] = 0,
    length: Annotated[int, typer.Option("--frames", help="An even number; two are a second.")] = 16,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
) -> None:
    """Write a drawn clip as a short video, and say what can be asked about it."""
    from winnow.watch.clip_files import save_clip
    from winnow.world.clips import clip

    drawn = clip(seed, length, split=split)
    film.parent.mkdir(parents=True, exist_ok=True)
    save_clip(drawn, film)
    say(film)
    for question in drawn.questions:
        say(f"{question.text} {question.answer}")


@train.command("reference")
def train_reference(
    preset: Annotated[str, typer.Option(help="small or base.")] = "small",
    out: Annotated[Path, typer.Option(help="The folder of the run.")] = Path("runs/reference"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, max=256, help="On a CPU: one for each core to use.")] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[float, typer.Option(help="Share of the full schedule.")] = 1.0,
    dropout: Annotated[bool, typer.Option(help="Switch off: the language model always sees all tokens.")] = True,
    cls_objective: Annotated[bool, typer.Option(help="Switch off: the tower learns from its patches alone.")] = True,
    tower: Annotated[Path | None, typer.Option(help="Start from the pretrained tower of this run.")] = None,
    until: Annotated[str, typer.Option(help="The last stage to run now.", show_default="all")] = "",
) -> None:
    """Train the reference model from scratch; its seed decides everything."""
    from winnow.learn.recipes.reference import train as fit
    from winnow.models.load import quiet

    quiet()
    say(
        fit(
            preset,
            out,
            resume=resume,
            device=device,
            processes=processes,
            seed=seed,
            scale=scale,
            dropout=dropout,
            cls_objective=cls_objective,
            tower=tower,
            until=until,
        )
    )


@train.command("recall")
def train_recall(
    out: Annotated[Path, typer.Option(help="The folder of the run.")] = Path("runs/recall"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[float, typer.Option(help="Share of the full schedule.")] = 1.0,
) -> None:
    """Train the text model of the recall tasks from scratch; its seed decides everything."""
    from winnow.learn.recipes.recall import train as fit
    from winnow.learn.workers import keep_memory
    from winnow.models.load import quiet

    quiet()
    keep_memory()
    say(fit(out, resume=resume, device=device, seed=seed, scale=scale))


@train.command("video")
def train_video(
    out: Annotated[Path, typer.Option(help="The folder of the run.")] = Path("runs/video"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[float, typer.Option(help="Share of the full schedule.")] = 1.0,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, to go on later.", show_default="at the end")
    ] = None,
) -> None:
    """Train the reference model of winnow's clips, which begins with the words of the one of its pictures."""
    import time

    from winnow.learn.recipes.video import train as fit
    from winnow.learn.workers import keep_memory
    from winnow.models.load import quiet

    quiet()
    keep_memory()
    stop = None if minutes is None else time.time() + 60 * minutes
    say(fit(out, resume=resume, device=device, seed=seed, scale=scale, stop_at=stop))


def main() -> None:
    """The `winnow` command."""
    try:
        app()
    finally:
        flush()


if __name__ == "__main__":
    main()
