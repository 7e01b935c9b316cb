"""What the processes of tests run. They import nothing else of the tests, so that they start quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


def wait_for_the_end(folder: str) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def two_steps(folder: str) -> None:
    """Two steps of a layer on data that differ between the processes; the weights are written."""
    from winnow.learn.optim import Optimizer
    from winnow.learn.workers import average_gradients, rank

    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = Optimizer([layer], 1e-2, 1e-2)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank()))
    for _ in range(2):
        layer(inputs).square().mean().backward()
        average_gradients(optimizer.parameters)
        optimizer.step(1.0)
    torch.save({"weight": layer.weight.data, "images": float(inputs.sum())}, f"{folder}/{rank()}.pt")
