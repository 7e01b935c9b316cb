"""`winnow stream`."""

from __future__ import annotations

import math
import sys
from typing import Annotated, Any

import typer

from winnow.cli_options import Device, DeviceMap, Dtype, Json, Model, Positions, Quantization, Revision, Trust
from winnow.cli_streams import print_json, warn
from winnow.core.errors import WinnowError
from winnow.watch import PLAN


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("stream")(stream)


def stream(
    video: Annotated[str, typer.Argument(help="A video, or clip:SEED[:FRAMES] for a clip of winnow's world.")],
    ask: Annotated[
        list[str] | None,
        typer.Option(
            "--ask",
            help='A question, with the second at which it is asked: "12.5:where is the cup?"; without one, at the end. '
            "Several: repeat it.",
            show_default="those of a drawn clip",
        ),
    ] = None,
    model: Model = None,
    method: Annotated[
        str, typer.Option("--method", help="A plan; a method of the cache in it bounds what is held.")
    ] = PLAN,
    positions: Positions = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Frames a second that are read.", show_default="2")] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Read each frame when it is due.")] = False,
    stamp: Annotated[
        str | None, typer.Option(help='Write the time before each frame: "{time:.1f}s: ".', show_default="nothing")
    ] = None,
    unbounded: Annotated[bool, typer.Option("--unbounded", help="Let the cache grow with each frame.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Length of an answer.")] = 16,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Read a video frame by frame within a bounded cache, and answer questions while it runs."""
    from winnow import __version__
    from winnow.cli_clips import FOREIGN, load_for
    from winnow.core.plan import Plan
    from winnow.models.quiet import quiet
    from winnow.watch.clip_inputs import BUNDLED
    from winnow.watch.questions import Question
    from winnow.watch.source import opened

    quiet()
    plan = Plan.of(method, positions=positions)
    asked = [Question.parse(said) for said in ask or ()]
    if model is None and fps not in (None, 2.0):
        raise WinnowError(f"--fps {fps:g}: the {BUNDLED} reads two frames a second; name a checkpoint with --model.")
    with opened(video, fps) as source:
        warnings = [FOREIGN] if model is None and source.drawn is None else []
        if source.drawn is not None:
            truth = {own.text: own.answer for own in source.drawn.questions}
            asked = [Question(own.time, own.text, truth.get(own.text)) for own in asked]
            asked = asked or [Question(math.inf, own.text, own.answer) for own in source.drawn.questions]
        loaded, processor = load_for(
            model is None,
            model,
            device=device,
            device_map=device_map,
            dtype=dtype,
            quantization=quantization,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        for warning in warnings:
            warn(f"warning: {warning}")
        result = _watched(
            source, loaded, processor, plan, asked, ask is None, as_json,
            bounded=not unbounded, stamp=stamp, realtime=realtime, most=max_new_tokens,
        )  # fmt: skip
    result = {"winnow": __version__, "model": model or BUNDLED, "video": video, "plan": plan.key, **result}
    if source.broken:
        warnings.append("the video is damaged or cut off, and frames at its end are missing.")
        warn(f"warning: {warnings[-1]}")
    if warnings:
        result["warning"] = " ".join(warnings)
    if as_json:
        print_json(result)
    if result["ended"] == "interrupted":
        raise typer.Exit(130)


def _watched(
    source: Any, model: Any, processor: Any, plan: Any, asked: list[Any], talks: bool, silent: bool, *, bounded: bool,
    stamp: str | None, realtime: bool, most: int,
) -> dict[str, Any]:  # fmt: skip
    """Watch to the end or to Ctrl-C; what became of it.

    Args:
        talks: whether more is asked at the end, where somebody can type.
        silent: whether nothing is shown.
    """
    import contextlib

    from winnow.cli_show import console, number
    from winnow.watch.loop import Watching
    from winnow.watch.questions import Typed
    from winnow.watch.record import Record
    from winnow.watch.screen import Screen
    from winnow.watch.viewer import viewer_of

    text = model.config.get_text_config()
    record = Record(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    shown = None if silent else console()
    typed = Typed.of(sys.stdin) if shown is not None and shown.is_terminal else None
    viewer = viewer_of(model, processor, plan, bounded=bounded, stamp=stamp)
    ended = "end"
    with contextlib.closing(viewer.session):
        for question in asked:
            viewer.check(question.text)
        screen = Screen(shown, f"{source.name}   {plan}", record, typed, number)
        watching = Watching(source, viewer, asked, record, screen, most=most, realtime=realtime)
        try:
            with typed or contextlib.nullcontext(), screen():
                watching.run(typed, stay=talks)
        except KeyboardInterrupt:
            ended = "interrupted"
    screen.summary()
    return {"source": source.facts(), "ended": ended, **record.facts()}
