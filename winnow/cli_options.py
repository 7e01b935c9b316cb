"""Options that several commands share, and how the model that they name is opened."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A Hub id or a folder.", show_default="the bundled reference model"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="a GPU if there is one")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or float64.", show_default="as in the checkpoint"),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(help="auto, balanced or sequential: spread the model over devices.", show_default="one device"),
]
Quantization = Annotated[
    str | None, typer.Option(help="8bit or 4bit, with bitsandbytes.", show_default="weights as they are")
]
Revision = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of the Hub's repository.", show_default="the newest")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")]
Keep = Annotated[
    str | None, typer.Option(help="Visual tokens to keep: 64, 0.25 or 25%.", show_default="as the method says")
]
Positions = Annotated[str | None, typer.Option(help="keep or compact.", show_default="keep")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder holds.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides everything.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def opened(model: str | None, **how: Any) -> tuple[Any, Any]:
    """The model that the options name, and its processor; the bundled one runs on one thread."""
    from winnow.models.load import load

    if model is None:
        on_one_thread()
    return load(model, **how)


def on_one_thread() -> None:
    """Bundled models gain little from more threads, and lose much when a core is taken.

    OMP_NUM_THREADS decides where it is set.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(1)
