"""The engine: one thread that owns the model, encodes requests one by one, and decodes them in batches of one width."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.memory import out_of_memory
from winnow.serve.decoding import Chooser, Listener, Row
from winnow.serve.errors import ApiError, internal, invalid, no_memory, stopping, told, where
from winnow.serve.job import Failed, Job
from winnow.serve.runners import Ready, Runners, batch_inputs, empty_cache, model_of, started

log = logging.getLogger("winnow.serve")


class Engine:
    """Answers jobs, in the order in which they came, batched by compressed length.

    Args:
        batch: the largest number of rows of a batch.
        on_batch: is told the rows of each batch that begins.
        on_broken: is called once when the device has failed for good.
    """

    def __init__(
        self,
        runners: Runners,
        tokenizer: Any,
        batch: int,
        on_batch: Callable[[int], None] = lambda rows: None,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self.runners, self.tokenizer, self.batch = runners, tokenizer, batch
        self.on_batch, self.on_broken = on_batch, on_broken
        self.broken = False
        self._ends = _ends(runners.model)
        self._waiting: deque[Job] = deque()
        self._ready: list[Ready] = []
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="winnow-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; it is told what becomes of it."""
        with self._changed:
            refused = self._closed or self.broken
            if not refused:
                self._waiting.append(job)
                self._changed.notify()
        if refused:
            job.say(Failed(stopping()))

    def cut(self) -> None:
        """End all jobs at the next step; each is told so."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *(ready.job for ready in self._ready), *self._running]
            self._waiting.clear()
            self._changed.notify()
        for job in jobs:
            job.say(Failed(stopping()))

    def close(self, seconds: float) -> bool:
        """Cut, and wait for the thread; whether it has ended."""
        self.cut()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def counts(self) -> tuple[int, int]:
        """Jobs that wait, and jobs that are decoded."""
        return len(self._waiting) + len(self._ready), sum(not job.over for job in self._running)

    def _run(self) -> None:
        while self._gather():
            batch = self._next()
            self._running = [ready.job for ready in batch]
            try:
                self._guarded(batch)
            finally:
                self._running = []

    def _gather(self) -> bool:
        """Encode waiting jobs until there are as many as a batch holds; False when the engine is closed."""
        while True:
            with self._changed:
                while not self._waiting and not self._ready and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return False
                job = self._waiting.popleft() if self._waiting and len(self._ready) < self.batch else None
            if job is not None and not job.over:
                self._encode(job)
            self._ready = [ready for ready in self._ready if not ready.job.over]
            if self._ready and (job is None or len(self._ready) >= self.batch):
                return True

    def _encode(self, job: Job) -> None:
        self._running = [job]
        try:
            with torch.no_grad():
                self._ready.append(self.runners.ready(job))
        except Exception as error:
            self._fail([job], error)
        finally:
            job.inputs = {}
            self._running = []

    def _next(self) -> list[Ready]:
        """The oldest job, and those that can be decoded with it."""
        first = self._ready[0]
        batch = [r for r in self._ready if r is first or (first.width and r.width == first.width)][: self.batch]
        self._ready = [ready for ready in self._ready if ready not in batch]
        return batch

    def _guarded(self, batch: Sequence[Ready]) -> None:
        """Decode a batch. One that does not fit into memory, or is no batch, is tried one by one."""
        try:
            self._decode(batch)
            return
        except Exception as error:
            again = len(batch) > 1 and (isinstance(error, UnsupportedError) or out_of_memory(error))
            untouched = [ready for ready in batch if not ready.job.over and not ready.job.heard]
            self._fail([r.job for r in batch if not again or r not in untouched], error)
        if again:
            empty_cache()
            for ready in untouched:
                self._guarded([ready])

    def _decode(self, batch: Sequence[Ready]) -> None:
        rows = [Row(ready.job, self.tokenizer, self._ends) for ready in batch]
        sampling = [row.job.sampling for row in rows]
        given = batch_inputs(batch)
        self.on_batch(len(rows))
        model_of(batch[0], self.runners).generate(
            **given,
            do_sample=False,  # the chooser samples, row by row
            num_beams=1,
            num_return_sequences=1,
            max_new_tokens=max(own.max_tokens for own in sampling),
            logits_processor=[Chooser(sampling)],
            stopping_criteria=[Listener(rows, before=lambda: _tell_started(batch))],
        )

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        found: ApiError
        if isinstance(error, WinnowError):
            found = invalid(told(error), "winnow.plan", "unsupported")
        elif out_of_memory(error):
            empty_cache()
            found = no_memory()
        else:
            found = internal()
            for job in jobs:
                log.error("%s %s", job.number, where(error))
        for job in jobs:
            job.say(Failed(found))
        if _is_final(error):
            self.broken = True
            self.cut()
            self.on_broken()


def _tell_started(batch: Sequence[Ready]) -> None:
    """Say what the model has read, now that it has."""
    for ready in batch:
        ledger = ready.prepared.ledger if ready.prepared is not None else ready.handle.last  # type: ignore[union-attr]
        ready.job.say(started(ready, ledger))  # type: ignore[arg-type]


def _ends(model: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    found = model.generation_config.eos_token_id
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)


def _is_final(error: Exception) -> bool:
    """Whether the device fails from now on, whatever it is asked: only a new process helps."""
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or "CUDA error" in str(error)
