"""`winnow train SLUG`: train a learned method on a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from winnow.cli_options import Device, Dtype, Model, Resume, Seed
from winnow.cli_streams import say
from winnow.learn import connectors, pruners
from winnow.learn.pruners import text

_one = typer.Typer(add_completion=False)
_of_text = typer.Typer(add_completion=False)
_of_clips = typer.Typer(add_completion=False)


class Trainable(TyperGroup):
    """A group in which each learned method is a command too."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_learned()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = _learned().get(cmd_name)
        if found is None:
            return super().get_command(ctx, cmd_name)
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


def _learned() -> dict[str, typer.Typer]:
    """The command of each learned method."""
    rooms = ((pruners, _one), (text, _of_text), (connectors, _of_clips))
    return {slug: command for room, command in rooms for slug in room.trainable()}


@_one.command()
def method(
    ctx: typer.Context,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the run.", show_default="runs/SLUG")] = None,
    resume: Resume = False,
    seed: Seed = 0,
    scale: Annotated[float, typer.Option(help="Share of the questions and steps of the recipe.")] = 1.0,
    data: Annotated[
        Path | None, typer.Option(help="Questions as JSON lines.", show_default="scenes of winnow's world")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Train this learned method on a frozen model; the file that is printed is what its setting `weights` takes."""
    from winnow.learn.pruners.fit import fit
    from winnow.models.quiet import quiet

    quiet()
    settings: dict[str, Any] = {"model": model, "resume": resume, "seed": seed, "scale": scale, "data": data}
    say(fit(str(ctx.info_name), out, **settings, device=device, dtype=dtype))


@_of_text.command()
def method_of_text(
    ctx: typer.Context,
    model: Annotated[
        Path | None, typer.Option(help="The folder of a text model.", show_default="the recall model")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the run.", show_default="runs/SLUG")] = None,
    resume: Resume = False,
    seed: Seed = 0,
    scale: Annotated[float, typer.Option(help="Share of the texts and steps of the recipe.")] = 1.0,
) -> None:
    """Train this learned method of the cache on recall texts, on a frozen text model of `winnow train recall`."""
    import importlib

    from winnow.models.quiet import quiet

    quiet()
    train = importlib.import_module(f"winnow.learn.pruners.text.{str(ctx.info_name).replace('-', '_')}").train
    say(train(out, model=None if model is None else str(model), resume=resume, seed=seed, scale=scale))


@_of_clips.command()
def method_of_clips(
    ctx: typer.Context,
    model: Annotated[
        Path | None,
        typer.Option(help="The folder of a model of `winnow train video`.", show_default="the video reference model"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the run.", show_default="runs/SLUG")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything.")] = 0,
    scale: Annotated[float, typer.Option(help="Share of the clips and steps of the recipe.")] = 1.0,
) -> None:
    """Train this learned connector on winnow's clips, on a frozen video model."""
    from winnow.learn.connectors.fit import fit
    from winnow.models.quiet import quiet

    quiet()
    say(
        fit(str(ctx.info_name), out, model=None if model is None else str(model), resume=resume, seed=seed, scale=scale)
    )


def toc3d(
    out: Annotated[Path | None, typer.Option(help="The folder of the run.", show_default="runs/toc3d")] = None,
    resume: Resume = False,
    seed: Seed = 0,
    scale: Annotated[float, typer.Option(help="Share of the drives and steps of the recipe.")] = 1.0,
) -> None:
    """Train winnow's toy detector for drives with several cameras, and ToC3D's selectors in it."""
    from winnow.learn.detection.toc3d import train

    say(train(out, resume=resume, seed=seed, scale=scale))


def frames(
    out: Annotated[Path | None, typer.Option(help="The folder of the run.", show_default="runs/frames")] = None,
    resume: Resume = False,
    seed: Seed = 0,
    scale: Annotated[float, typer.Option(help="Share of the clips and steps of the recipe.")] = 1.0,
) -> None:
    """Train winnow's toy writer of frames, which Deep Forcing is tried on."""
    from winnow.learn.generation.deep_forcing import train

    say(train(out, resume=resume, seed=seed, scale=scale))
