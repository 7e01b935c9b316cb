"""What a stream is fed: pictures, or what a processor has made of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.engine.stream_words import Words

_NEEDED = 'without a processor, feed what one makes: {"input_ids": [1, n], "pixel_values": …}, nothing of it padding'


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of the prompt.

    Attributes:
        ids: its tokens, with a placeholder for each token of its frames.
        rest: pixels, grids and sizes.
        positions: `[3, 1, n + 1]` where its tokens stand in the stream, and where text goes on behind them; None: as
            the model's own rule says, behind what was read.
    """

    ids: Int[Tensor, "1 n"]
    rest: dict[str, Tensor] = field(default_factory=dict)
    positions: Int[Tensor, "3 1 m"] | None = None


def piece_of(given: Any) -> Piece:
    """What a processor made, checked."""
    if not isinstance(given, Mapping):
        raise WinnowError(f"got {type(given).__name__}; {_NEEDED}. Or pass processor= to winnow.stream.")
    rest = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    ids, mask = rest.pop("input_ids", None), rest.pop("attention_mask", None)
    positions = rest.pop("position_ids", None)
    for name in ("mm_token_type_ids", "token_type_ids"):
        rest.pop(name, None)
    if ids is None or ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1]:
        raise WinnowError(f"got input_ids {None if ids is None else tuple(ids.shape)}; {_NEEDED}.")
    if mask is not None and not bool(mask.all()):
        raise WinnowError(f"the attention_mask hides tokens; {_NEEDED}.")
    if not any(name.startswith("pixel_values") for name in rest):
        raise WinnowError(f"got {', '.join(given) or 'nothing'}, and no pixels; {_NEEDED}.")
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != (3, 1, ids.shape[1] + 1)):
        raise WinnowError(
            f"got position_ids {tuple(positions.shape)} of {positions.dtype}; give int64 [3, 1, {ids.shape[1] + 1}]: "
            "where the tokens stand and, last, where text goes on behind them. Without them the model's own rule "
            "places what it reads."
        )
    return Piece(ids, rest, positions)


def pieces_of(given: Any, words: Words) -> list[Piece]:
    """Pictures, one after the other."""
    frames = list(given) if isinstance(given, list | tuple) else [given]
    if not frames:
        raise WinnowError("got an empty list; feed a picture.")
    pieces = []
    for frame in [_picture(frame) for frame in frames]:
        ids, rest = words.frame(frame)
        pieces.append(Piece(ids[None], rest))
    return pieces


def _picture(frame: Any) -> Image.Image:
    if isinstance(frame, Image.Image):
        return frame if frame.mode == "RGB" else frame.convert("RGB")
    if isinstance(frame, Tensor):
        frame = frame.detach().cpu().numpy() if frame.dtype == torch.uint8 else frame
    bytes_ = isinstance(frame, np.ndarray) and frame.dtype == np.uint8
    if bytes_ and frame.ndim == 3 and frame.shape[2] == 3 and min(frame.shape) > 0:
        return Image.fromarray(np.ascontiguousarray(frame))
    what = f"{tuple(frame.shape)} of {frame.dtype}" if isinstance(frame, Tensor | np.ndarray) else type(frame).__name__
    raise WinnowError(
        f"a frame is a PIL picture or bytes [H, W, 3] (RGB, uint8), got {what}; open files with "
        "winnow.media.open_image."
    )


def checked_ids(question: Any) -> Tensor:
    if not isinstance(question, Tensor) or question.dtype != torch.int64 or question.ndim != 2 or len(question) != 1:
        raise WinnowError(
            f"without a processor a question is token ids [1, m] of int64, got {type(question).__name__}; or pass "
            "processor= to winnow.stream, and ask in words."
        )
    if not question.shape[1]:
        raise WinnowError("the question is empty; ask something.")
    return question


def checked_stamp(stamp: str | None, processor: Any) -> str | None:
    if stamp is None:
        return None
    try:
        told = stamp.format(time=1.0) != stamp.format(time=2.0)
    except (AttributeError, KeyError, IndexError, ValueError):
        told = False
    if not told or processor is None:
        raise WinnowError(f"stamp={stamp!r}: it holds {{time}}, as in '{{time:.1f}}s: ', and needs processor=.")
    return stamp


def checked_times(time: Any, count: int, last: float | None) -> list[float | None]:
    if time is None:
        return [None] * count
    times = list(time) if isinstance(time, Sequence) and not isinstance(time, str) else [time]
    numbers = all(isinstance(t, int | float) and not isinstance(t, bool) and math.isfinite(t) for t in times)
    if not numbers or len(times) != count:
        raise WinnowError(f"time={time!r}: give seconds for each of {count} frames.")
    for t in times:
        if last is not None and t < last:
            raise WinnowError(f"time={t}: frames come in order, and the last one was at {last}.")
        last = t
    return times
