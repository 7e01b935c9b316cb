"""Times and boxes as words of a language model's vocabulary (OmniVid): a moment is two tokens, a box is four.

Pure Python. What a model has written is read back without an exception, however malformed. New words need embeddings
that are trained; on a frozen language model, write times as text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from winnow.core.errors import WinnowError

Span = tuple[float, float]
Box = tuple[float, float, float, float]
Event = tuple[float, float, str]

_TIME, _BOX = re.compile(r"<time_bin_(\d+)>"), re.compile(r"<box_(\d+)>")
_EVENT = re.compile(r"<event>(.*?)(?:</event>|(?=<event>)|$)", re.DOTALL)
MOST_EVENTS = 30


@dataclass(frozen=True)
class Bins:
    """Numbers from 0 to a whole as one of a few.

    Args:
        bins: how many there are; the last stands for the whole.
        rounding: to the `nearest`, or `down` as the authors' code does, which may be off by a whole bin.
    """

    bins: int = 100
    rounding: Literal["nearest", "down"] = "nearest"

    def __post_init__(self) -> None:
        if self.bins < 2 or self.rounding not in ("nearest", "down"):
            raise WinnowError(
                f"{self.bins} bins, rounded {self.rounding!r}; allowed: 2 or more, rounded 'nearest' or 'down'."
            )

    def of(self, value: float, whole: float) -> int:
        """The bin of a value; what is outside goes to the end that is nearer.

        Raises:
            WinnowError: the value is no number, or the whole is not above 0.
        """
        if not math.isfinite(value) or not 0 < whole < math.inf:
            raise WinnowError(f"{value} of {whole} was given; give a finite number, of a whole above 0.")
        exact = value / whole * (self.bins - 1)
        number = math.floor(exact + 0.5) if self.rounding == "nearest" else int(exact)
        return min(max(number, 0), self.bins - 1)

    def value(self, number: int, whole: float) -> float:
        """What a bin stands for; one that is not there, for the end that is nearer."""
        return min(max(number, 0), self.bins - 1) / (self.bins - 1) * whole


@dataclass(frozen=True)
class TimeTokens(Bins):
    """Moments as two words.

    Args:
        form: start and end, or centre and duration (the authors' for dense captions, with 300 bins).
    """

    form: Literal["start-end", "center-duration"] = "start-end"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("start-end", "center-duration"):
            raise WinnowError(f"form {self.form!r}; allowed: 'start-end' or 'center-duration'.")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return tuple(f"<time_bin_{i}>" for i in range(self.bins))

    def encode(self, start: float, end: float, duration: float) -> tuple[str, str]:
        """The words of a moment in a video of so many seconds."""
        pair = (start, end) if self.form == "start-end" else ((start + end) / 2, end - start)
        first, second = (f"<time_bin_{self.of(value, duration)}>" for value in pair)
        return first, second

    def decode(self, text: str | Sequence[str], duration: float) -> Span | None:
        """Start and end, in seconds with two decimals; None where there are not two words of time.

        They are swapped where they are the wrong way round; where they are equal, the moment begins a bin earlier.
        """
        found = [int(number) for number in _TIME.findall(text if isinstance(text, str) else " ".join(text))]
        if len(found) < 2:
            return None
        a, b = (self.value(number, duration) for number in found[:2])
        start, end = (a, b) if self.form == "start-end" else (a - b / 2, a + b / 2)
        start, end = min(start, end), max(start, end)
        if start == end:
            start -= duration / (self.bins - 1)
        return round(min(max(start, 0.0), duration), 2), round(min(max(end, 0.0), duration), 2)


@dataclass(frozen=True)
class BoxTokens(Bins):
    """Boxes as four words: left, top, right, bottom."""

    bins: int = 1000

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return tuple(f"<box_{i}>" for i in range(self.bins))

    def encode(self, box: Box, width: float, height: float) -> tuple[str, ...]:
        """The words of a box, in pixels of a picture of this size."""
        return tuple(f"<box_{self.of(v, whole)}>" for v, whole in zip(box, (width, height) * 2, strict=True))

    def decode(self, text: str | Sequence[str], width: float, height: float) -> Box | None:
        """The box; None where there are not four words of one. Sides that are the wrong way round are swapped."""
        found = [int(number) for number in _BOX.findall(text if isinstance(text, str) else " ".join(text))]
        if len(found) < 4:
            return None
        x0, y0, x1, y1 = (self.value(n, whole) for n, whole in zip(found[:4], (width, height) * 2, strict=True))
        return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def write_events(events: Sequence[Event], duration: float, times: TimeTokens, *, counted: bool = True) -> str:
    """What a model is to write of a video: how many events there are, then when each is and what it is."""
    if counted and len(events) > MOST_EVENTS:
        raise WinnowError(f"{len(events)} events were given; words count up to {MOST_EVENTS}. Pass counted=False.")
    told = [f"<event> {' '.join(times.encode(start, end, duration))} {said} </event>" for start, end, said in events]
    head = [f"There are <counter_{len(events)}> events in the given video."] if counted else []
    return " ".join([*head, *told])


def read_events(text: str, duration: float, times: TimeTokens) -> list[Event]:
    """The events in what a model has written; those without a moment are left out."""
    found = []
    for part in _EVENT.findall(text):
        span = times.decode(part, duration)
        if span is not None:
            found.append((*span, " ".join(_TIME.sub(" ", part).split())))
    return found


def new_words(times: TimeTokens, boxes: BoxTokens | None = None) -> tuple[str, ...]:
    """All words that a vocabulary needs for these."""
    counters = tuple(f"<counter_{i}>" for i in range(MOST_EVENTS + 1))
    of_boxes = () if boxes is None else ("<obj>", "</obj>", *boxes.vocabulary)
    return (*times.vocabulary, "<event>", "</event>", "<background>", *counters, *of_boxes)
