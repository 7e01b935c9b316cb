"""Job: one request on its way through the engine, and what it tells the one who waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from winnow.core.plan import Plan
from winnow.serve.errors import ApiError
from winnow.serve.schema import Sampling


@dataclass(frozen=True)
class Started:
    """The model has read the prompt.

    Attributes:
        prompt: tokens that it got.
        given, kept: content tokens of the pictures, and how many of them were left.
        plan: in short.
    """

    prompt: int
    given: int
    kept: int
    plan: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    piece: str


@dataclass(frozen=True)
class Done:
    """The answer is complete.

    Attributes:
        reason: `stop` or `length`.
        tokens: that were generated, the end token included.
    """

    reason: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: ApiError


Event = Started | Text | Done | Failed


@dataclass(eq=False)
class Job:
    """A request that is ready for the engine.

    Attributes:
        inputs: of the model, on the CPU, not compressed.
        sizes: content tokens of each picture.
        plan: None: the server's own.
        tell: takes events, from the engine's thread.
        number: of the request, for the log.
        born: when it was made, in seconds of the monotonic clock.
        heard: whether a piece of its answer has been told.
    """

    inputs: dict[str, Any]
    sizes: tuple[int, ...]
    plan: Plan | None
    sampling: Sampling
    tell: Callable[[Event], None]
    number: str = ""
    born: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    heard: bool = False
    _over: bool = False

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def over(self) -> bool:
        """Whether it is answered, failed or cancelled."""
        return self._over or self.cancelled

    def say(self, event: Event) -> None:
        """Tell an event, unless the last one has been told."""
        if not self.over:
            self._over = isinstance(event, Done | Failed)
            self.heard = self.heard or isinstance(event, Text)
            self.tell(event)
