"""Questions: those with a time, and those that are typed while the video runs."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import math
import os
import queue
import re
import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from winnow.core.errors import WinnowError

_TIMED = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*:(.*)", re.DOTALL)
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[@-~]|O.|.)?")  # what arrow and function keys send
_BLINK = 0.1  # seconds after which the thread looks whether it is to end


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        time: in seconds of the video; infinite: at its end.
        truth: the right answer, where it is known.
    """

    time: float
    text: str
    truth: str | None = None

    @staticmethod
    def parse(said: str) -> Question:
        """`12.5:where is the cup?`, or a question without a time, which is asked at the end."""
        match = _TIMED.fullmatch(said)
        time, text = (math.inf, said) if match is None else (float(match[1]), match[2])
        if not text.strip():
            raise WinnowError(f'--ask {said!r} asks nothing; write --ask "12.5:where is the cup?".')
        return Question(time, text.strip())


class Typed:
    """Lines that are typed on a terminal while something else is drawn there, without echo. A context manager.

    Attributes:
        text: what is typed of the next line.
        ended: whether nothing more comes (Ctrl-D).
    """

    def __init__(self, file: int, termios: Any, tty: Any) -> None:
        self._file, self._termios, self._tty = file, termios, tty
        self._lines: queue.Queue[str] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self.text, self.ended = "", False

    @staticmethod
    def of(stream: Any) -> Typed | None:
        """Of a terminal; None where a stream is none."""
        with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
            if stream.isatty():
                return Typed(stream.fileno(), importlib.import_module("termios"), importlib.import_module("tty"))
        return None

    def __enter__(self) -> Typed:
        self._before = self._termios.tcgetattr(self._file)
        self._tty.setcbreak(self._file)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._termios.tcsetattr(self._file, self._termios.TCSADRAIN, self._before)

    def lines(self, seconds: float = 0.0) -> Iterator[str]:
        """The lines that have come; waits so long for the first one."""
        with contextlib.suppress(queue.Empty):
            yield self._lines.get(timeout=seconds) if seconds > 0 else self._lines.get_nowait()
            while True:
                yield self._lines.get_nowait()

    def _listen(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while not self._stop.is_set() and not self.ended:
            if select.select([self._file], [], [], _BLINK)[0]:
                data = os.read(self._file, 1024)
                self.take(decoder.decode(data) if data else "\x04")

    def take(self, typed: str) -> None:
        """What keys have sent."""
        for key in _ESCAPES.sub("", typed):
            if key in "\r\n":
                self._lines.put(self.text)
                self.text = ""
            elif key in "\x7f\b":
                self.text = self.text[:-1]
            elif key == "\x15":  # Ctrl-U
                self.text = ""
            elif key == "\x04":  # Ctrl-D
                self.ended = not self.text
            elif key.isprintable():
                self.text += key
