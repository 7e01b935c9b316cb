"""The loop: frames are read as they come, and questions are asked when they are due or typed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from winnow.core.errors import WinnowError
from winnow.watch.questions import Question, Typed
from winnow.watch.record import Answer, Record
from winnow.watch.screen import Screen
from winnow.watch.source import Source
from winnow.watch.viewer import Viewer


class Watching:
    """One video and whoever watches it.

    Args:
        asked: questions with a time.
        most: tokens of an answer.
        realtime: whether a frame is read when it is due, counted from the start; frames that are late are read at once.
    """

    def __init__(
        self,
        source: Source,
        viewer: Viewer,
        asked: Sequence[Question],
        record: Record,
        screen: Screen,
        *,
        most: int,
        realtime: bool = False,
    ) -> None:
        self.source, self.viewer, self.record, self.screen = source, viewer, record, screen
        self.due = sorted(asked, key=lambda question: question.time)
        self.most, self.realtime = most, realtime

    def run(self, typed: Typed | None = None, stay: bool = False) -> None:
        """Read the video to its end.

        Args:
            typed: lines that may come at any time.
            stay: whether to wait for more of them at the end, until an empty one or Ctrl-D.
        """
        begin = time.monotonic()
        for frame in self.source.frames:
            self._ask_due(frame.time)
            if self.realtime:
                self._wait(begin + frame.time, typed)
            self.record.frames, self.record.last = self.record.frames + 1, (frame.number, frame.time)
            if self.viewer.feed(frame):
                self.record.read(self.viewer.session.ledger)
            self._take(typed)
        if self.viewer.end():
            self.record.read(self.viewer.session.ledger)
        self._ask_due(None)
        self._take(typed)
        if stay and typed is not None:
            self.screen.told("The video has ended. Ask more, or end with an empty line.")
            while not typed.ended:
                for line in typed.lines(seconds=0.2):
                    if not line.strip():
                        return
                    self._try(line)

    def _ask_due(self, until: float | None) -> None:
        """Ask what is due before a time; None: at the end. Nothing is asked before anything was read."""
        while self.due and (until is None or self.due[0].time < until) and self.viewer.session.ledger.frames:
            self._ask(self.due.pop(0))

    def _wait(self, until: float, typed: Typed | None) -> None:
        while (left := until - time.monotonic()) > 0:
            if typed is None:
                time.sleep(left)
            else:
                self._take(typed, left)

    def _take(self, typed: Typed | None, seconds: float = 0.0) -> None:
        for line in () if typed is None else typed.lines(seconds):
            if line.strip():
                self._try(line)

    def _try(self, line: str) -> None:
        """Ask what was typed. What cannot be asked is told, and the stream goes on."""
        why = ""
        try:
            self.viewer.check(line)
            self._ask(Question(self.record.last[1], line.strip(), self._truth(line.strip())))
        except WinnowError as error:
            why = str(error)
        if why:
            self.screen.refused(line, why)

    def _truth(self, text: str) -> str | None:
        """The right answer about the whole clip, where the clip is drawn and knows the question."""
        known = () if self.source.drawn is None else self.source.drawn.questions
        return next((question.answer for question in known if question.text == text), None)

    def _ask(self, question: Question) -> None:
        said = self.viewer.ask(question.text, self.most)
        found = Answer(self.record.last[1], question.text, said, question.truth, self.viewer.session.ledger.answer_ms)
        self.record.answers.append(found)
        self.screen.answered(found)
