"""Clock: milliseconds by phase, synchronised with the device. It costs nothing while it is off."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch


class Clock:
    """Sums the time of named phases of one context; a phase inside another is taken out of the outer one."""

    def __init__(self) -> None:
        self.on = False
        self._times: ContextVar[dict[str, float] | None] = ContextVar("winnow_times", default=None)
        self._open: ContextVar[list[list[Any]] | None] = ContextVar("winnow_open", default=None)

    def phase(self, name: str) -> Any:
        return self._timed(name) if self.on else nullcontext()

    def times(self) -> dict[str, float]:
        """The sums since `restart`, in milliseconds; the same dictionary keeps growing."""
        found = self._times.get()
        if found is None:
            found = self.restart()
        return found

    def restart(self) -> dict[str, float]:
        """A new request begins."""
        fresh: dict[str, float] = {}
        self._times.set(fresh)
        self._open.set([])
        return fresh

    def start(self, name: str) -> None:
        if self.on:
            stack = self._open.get()
            if stack is None:
                stack = []
                self._open.set(stack)
            stack.append([name, _now(), 0.0])

    def stop(self) -> None:
        stack = self._open.get()
        if not self.on or not stack:
            return
        name, start, inner = stack.pop()
        spent = _now() - start
        if stack:
            stack[-1][2] += spent
        times = self.times()
        times[name] = times.get(name, 0.0) + spent - inner

    @property
    def idle(self) -> bool:
        """Whether no phase is open in this context."""
        return not self._open.get()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1000
