"""Data-parallel training over a few processes of one machine: each draws its own scenes, gradients are averaged."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from winnow.children import end_with_parent
from winnow.models.quiet import quiet


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over the processes, in one exchange."""
    if world() == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def keep_memory() -> None:
    """Let glibc keep freed memory: giving large blocks back and faulting them in again costs a tenth of a step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most that glibc takes
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 1 << 28)  # M_TOP_PAD


def give_memory_back() -> None:
    """What `keep_memory` made glibc keep, but nothing uses: a stage of small batches needs less than the one before."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def launch(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run `function(*arguments)` in `processes` processes of one thread each (here, when there is only one)."""
    if processes == 1:
        function(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (processes, str(Path(folder) / "store"), function, arguments), nprocs=processes)


def _worker(index: int, processes: int, store: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    keep_memory()
    quiet()
    # A stopped machine (a laptop lid, a paused job) must not end the run, hence the long timeout.
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=index, world_size=processes, timeout=timedelta(hours=12)
    )
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
