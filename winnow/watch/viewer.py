"""Who watches: a session of a stream, fed with frames and asked in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from winnow.core.plan import Plan
from winnow.engine.stream import Session, stream
from winnow.models.inputs import check_question
from winnow.reference.video import ClipProcessor
from winnow.video import Frame
from winnow.watch.clip_inputs import ClipStream, check_words


class Viewer(Protocol):
    """A model that reads frames as they come."""

    session: Session

    def feed(self, frame: Frame) -> bool:
        """Take a frame; whether the model has read anything now, as some read several at once."""

    def end(self) -> bool:
        """Read what has waited for more frames; whether anything has."""

    def check(self, question: str) -> None:
        """Refuse what the model cannot be asked."""

    def ask(self, question: str, most: int) -> str:
        """An answer of at most so many tokens."""


@dataclass(eq=False)
class Frames:
    """A checkpoint, to which each frame is a picture."""

    session: Session
    processor: Any

    def feed(self, frame: Frame) -> bool:
        self.session.feed(frame.pixels, time=frame.time)
        return True

    def end(self) -> bool:
        return False

    def check(self, question: str) -> None:
        check_question(self.processor, question)

    def ask(self, question: str, most: int) -> str:
        return str(self.session.ask(question, max_new_tokens=most))


@dataclass(eq=False)
class Seconds:
    """The bundled video reference model, which reads two frames as a second."""

    session: Session
    clip: ClipStream

    def feed(self, frame: Frame) -> bool:
        return self._read(self.clip.parts(frame.pixels), frame.time)

    def end(self) -> bool:
        return self._read(self.clip.rest(), None)

    def _read(self, parts: list[dict[str, Any]], time: float | None) -> bool:
        for part in parts:
            self.session.feed(part, time=time)
        return bool(parts)

    def check(self, question: str) -> None:
        check_words(question)
        self.clip.question(question)

    def ask(self, question: str, most: int) -> str:
        return self.clip.said(self.session.ask(self.clip.question(question), max_new_tokens=most))


def viewer_of(model: Any, processor: Any, plan: Plan, *, bounded: bool, stamp: str | None) -> Viewer:
    """Whoever fits the model; its session is to be closed."""
    if isinstance(processor, ClipProcessor):
        return Seconds(stream(model, plan, bounded=bounded, stamp=stamp), ClipStream(model, processor))
    return Frames(stream(model, plan, processor, bounded=bounded, stamp=stamp), processor)
