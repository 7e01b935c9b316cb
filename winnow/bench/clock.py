"""Host time of what a device does, and whether this machine can be timed at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from winnow.engine.clock import now

BUSY_SHARE = 0.25  # of the cores, that others may use
BUSY_BYTES = 2**31  # of the GPU's memory, that others may hold


def clocked(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What `run` returns, and the milliseconds that it took."""
    start = now(device)
    found = run()
    return found, now(device) - start


def busy(device: str = "cpu") -> str:
    """Why this machine cannot time anything now; empty when it can."""
    cores = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # not every system keeps one
        load = 0.0
    if load > max(1.0, BUSY_SHARE * cores):
        return f"the load average is {load:.1f} on {cores} cores"
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        if others > BUSY_BYTES:
            return f"other processes hold {others / 2**30:.1f} GiB of the GPU"
    return ""
