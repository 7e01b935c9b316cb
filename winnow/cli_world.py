"""`winnow world`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli_streams import say

Count = Annotated[int, typer.Option("--count", "-n", min=1, help="How many scenes.")]
Size = Annotated[int, typer.Option(help="Pixels of a side.")]
Split = Annotated[str, typer.Option(help="train, test or heldout_glyphs.")]
Seed = Annotated[int, typer.Option(help="Of the first scene.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    group = typer.Typer(
        no_args_is_help=True, help="The reference world: drawn scenes whose questions carry their evidence."
    )
    group.command("show")(show)
    group.command("export")(export)
    group.command("clip")(clip)
    app.add_typer(group, name="world")


def show(
    sheet: Annotated[Path, typer.Argument(help="The PNG to write.")],
    count: Count = 20,
    size: Size = 224,
    split: Split = "test",
    seed: Seed = 0,
    boxes: Annotated[bool, typer.Option("--boxes", help="Outline the evidence of each question.")] = False,
) -> None:
    """Draw scenes and their questions on one sheet."""
    from winnow.world.export import show as draw

    say(draw(sheet, count, size, split, seed, boxes=boxes))


def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    count: Count = 20,
    size: Size = 224,
    split: Split = "test",
    seed: Seed = 0,
) -> None:
    """Write scenes as PNG files, and their questions with answers and evidence as JSON lines."""
    from winnow.world.export import export as write

    say(write(folder, count, size, split, seed))


def clip(
    film: Annotated[Path, typer.Argument(help="The .mp4 or .gif to write.")],
    seed: Annotated[int, typer.Option(help="Of the clip.")] = 0,
    length: Annotated[int, typer.Option("--frames", help="An even number; two are a second.")] = 16,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
) -> None:
    """Write a drawn clip as a short video, and say what can be asked about it."""
    from winnow.watch.clip_files import save_clip
    from winnow.world.clips import clip as draw

    drawn = draw(seed, length, split=split)
    film.parent.mkdir(parents=True, exist_ok=True)
    save_clip(drawn, film)
    say(film)
    for question in drawn.questions:
        say(f"{question.text} {question.answer}")
