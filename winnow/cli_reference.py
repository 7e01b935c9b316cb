"""`winnow train reference`, `recall` and `video`: the models that winnow ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from winnow.cli_options import Resume, Seed
from winnow.cli_streams import say

Folder = Annotated[Path, typer.Option(help="The folder of the run.")]
OneDevice = Annotated[str, typer.Option(help="cpu or cuda.")]
Scale = Annotated[float, typer.Option(help="Share of the full schedule.")]


def reference(
    preset: Annotated[str, typer.Option(help="small or base.")] = "small",
    out: Folder = Path("runs/reference"),
    resume: Resume = False,
    device: OneDevice = "cpu",
    processes: Annotated[int, typer.Option(min=1, max=256, help="On a CPU: one for each core to use.")] = 1,
    seed: Seed = 0,
    scale: Scale = 1.0,
    dropout: Annotated[bool, typer.Option(help="Switch off: the language model always sees all tokens.")] = True,
    cls_objective: Annotated[bool, typer.Option(help="Switch off: the tower learns from its patches alone.")] = True,
    tower: Annotated[Path | None, typer.Option(help="Start from the pretrained tower of this run or model.")] = None,
    until: Annotated[str, typer.Option(help="The last stage to run now.", show_default="all")] = "",
) -> None:
    """Train the reference model from scratch; its seed decides everything."""
    from winnow.learn.recipes.reference import train as fit
    from winnow.models.quiet import quiet

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


def recall(
    out: Folder = Path("runs/recall"),
    resume: Resume = False,
    device: OneDevice = "cpu",
    seed: Seed = 0,
    scale: Scale = 1.0,
) -> None:
    """Train the text model of the recall tasks from scratch; its seed decides everything."""
    from winnow.learn.recipes.recall import train as fit
    from winnow.learn.workers import keep_memory
    from winnow.models.quiet import quiet

    quiet()
    keep_memory()
    say(fit(out, resume=resume, device=device, seed=seed, scale=scale))


def video(
    out: Folder = Path("runs/video"),
    resume: Resume = False,
    device: OneDevice = "cpu",
    seed: Seed = 0,
    scale: Scale = 1.0,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, to go on later.", show_default="at the end")
    ] = None,
) -> None:
    """Train the reference model of winnow's clips, which begins with the words of the one of its pictures."""
    import time

    from winnow.learn.recipes.video import train as fit
    from winnow.learn.workers import keep_memory
    from winnow.models.quiet import quiet

    quiet()
    keep_memory()
    stop = None if minutes is None else time.time() + 60 * minutes
    say(fit(out, resume=resume, device=device, seed=seed, scale=scale, stop_at=stop))
