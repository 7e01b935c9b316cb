"""`winnow serve` whose model writes slowly and without end, and fails when a request asks for a certain length."""

from __future__ import annotations

import time
from typing import Any

import torch

import winnow.models.load
from winnow.serve.decoding import Chooser, Listener

OUT_OF_MEMORY, FAILS_LATE, DEVICE_LOST = 101, 102, 103  # max_tokens of requests that fail
STEP = 0.03  # seconds

load, choose, listen = winnow.models.load.load, Chooser.__call__, Listener.__call__


def endless(*args: Any, **options: Any) -> Any:
    model, processor = load(*args, **options)
    model.generation_config.eos_token_id = None
    return model, processor


def faulty(self: Chooser, input_ids: Any, scores: Any) -> Any:
    lengths = [row.max_tokens for row in self.rows]
    if OUT_OF_MEMORY in lengths:
        raise torch.OutOfMemoryError("CUDA out of memory in /secret/path at 0x7f00")
    self.steps = getattr(self, "steps", 0) + 1
    if FAILS_LATE in lengths and self.steps > 5:
        raise RuntimeError("a fault in /secret/path at 0x7f00")
    if DEVICE_LOST in lengths and self.steps > 5:
        raise RuntimeError("CUDA error: an illegal memory access was encountered in /secret/path")
    return choose(self, input_ids, scores)


def slow(self: Listener, *args: Any, **options: Any) -> Any:
    time.sleep(STEP)
    return listen(self, *args, **options)


if __name__ == "__main__":
    from winnow.cli import main

    winnow.models.load.load = endless
    Chooser.__call__, Listener.__call__ = faulty, slow  # type: ignore[method-assign]
    main()
