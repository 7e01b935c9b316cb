"""Clock: milliseconds by phase of one request, synchronised with the device. It costs nothing while it is off."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class Clock:
    """Sums the time of named phases; a phase inside another is taken out of the outer one.

    Args:
        on: whether anything is measured.
        device: whose work is waited for.
        times: the dictionary that grows.
    """

    def __init__(self, on: bool, device: torch.device, times: dict[str, float] | None = None) -> None:
        self.on, self.device = on, device
        self.times: dict[str, float] = {} if times is None else times
        self._open: list[list[Any]] = []

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._timed(name) if self.on else nullcontext()

    def start(self, name: str) -> None:
        if self.on:
            self._open.append([name, now(self.device), 0.0])

    def stop(self) -> None:
        if not self._open:
            return
        name, start, inner = self._open.pop()
        spent = now(self.device) - start
        if self._open:
            self._open[-1][2] += spent
        self.times[name] = self.times.get(name, 0.0) + spent - inner

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop()


def now(device: torch.device) -> float:
    """Milliseconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1000
