"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

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
Positions = Annotated[str | None, typer.Option(help="keep or compact.", show_default="keep")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
