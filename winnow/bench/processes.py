"""A sweep in several processes that share one store: each takes every n-th batch."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from winnow.bench.baselines import BASELINES, OF_CLIPS
from winnow.bench.clips import clip_task, learned_types
from winnow.bench.environment import code_hash
from winnow.bench.plans import FULL_JOB
from winnow.bench.runner import CHECKED, NEW_TOKENS, bench, refuse_mismatches
from winnow.bench.store import Store
from winnow.bench.tasks import Task, data_task, world_task
from winnow.children import end_with_parent
from winnow.core.errors import WinnowError
from winnow.core.registry import picture_methods
from winnow.models.load import device_of, load
from winnow.models.quiet import quiet
from winnow.reference import video


@dataclass(frozen=True)
class Sweep:
    """What a process needs to take its share of a sweep; see `runner.bench`.

    Attributes:
        model: a Hub id or a folder; None is the bundled reference model.
        data: the user's file; None means winnow's own world, with the given split, start and size.
        clips: frames of clips to ask about, instead of pictures; the model is then the video reference model, or a
            folder of one.
        types: of the questions about clips; None: those that the model has learned, by its card.
        threads: of each process; None leaves torch's choice.
        code: hash of the code that the first process runs; the others must run the same.
    """

    store: str
    methods: tuple[str, ...]
    budgets: tuple[str, ...]
    model: str | None = None
    data: str | None = None
    questions: int | None = None
    split: str = "test"
    start: int = 0
    baselines: tuple[str, ...] = BASELINES
    batch: int = 16
    seed: int = 0
    max_new_tokens: int | None = None
    positions: str | None = None
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    checked: int = CHECKED
    clips: int | None = None
    types: tuple[str, ...] | None = None
    threads: int | None = None
    resume: bool = True
    shard: tuple[int, int] = (0, 1)
    code: str = ""

    def task(self, model: Any) -> Task:
        if self.clips is not None:
            if self.data is not None:
                raise WinnowError("--clips asks about winnow's own clips; leave --data out.")
            types = learned_types(self.model) if self.types is None else self.types
            return clip_task(self.questions or 400, frames=self.clips, split=self.split, seed=self.start, types=types)
        if self.data is not None:
            return data_task(self.data, self.questions)
        side = getattr(getattr(model.config, "vision_config", None), "image_size", 224)
        size = 336 if isinstance(side, int) and side > 224 else 224
        return world_task(self.questions or 400, split=self.split, seed=self.start, size=size)

    def loaded(self) -> tuple[Any, Any]:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.clips is not None:
            model, processor = video.load(self.model)
            return model.to(device_of(self.device)), processor  # type: ignore[arg-type]
        return load(self.model, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code)

    @property
    def name(self) -> str:
        return self.model or f"bundled {'video ' if self.clips is not None else ''}reference model"

    @property
    def all_baselines(self) -> tuple[str, ...]:
        return self.baselines if self.clips is None else (*self.baselines, *OF_CLIPS)

    def answer_length(self) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        from winnow.reference import MAX_NEW_TOKENS

        return MAX_NEW_TOKENS if self.model is None or self.clips is not None else NEW_TOKENS


def run(sweep: Sweep, *, progress: bool = False, say: Callable[[str], None] = lambda text: None) -> str:
    """This process's share of a sweep; returns the key of the run."""
    if sweep.code not in ("", code_hash()):
        raise WinnowError("the code of winnow was changed while the processes started; run the command again.")
    model, processor = sweep.loaded()
    with Store(sweep.store, create=True) as store:
        return bench(
            model, processor, sweep.methods, sweep.budgets, sweep.task(model), store,
            name=sweep.name, baselines=sweep.all_baselines, batch=sweep.batch,
            seed=sweep.seed, max_new_tokens=sweep.answer_length(), positions=sweep.positions, checked=sweep.checked,
            shard=sweep.shard, resume=sweep.resume, progress=progress, say=say,
        )  # fmt: skip


def run_all(
    sweep: Sweep, processes: int, *, progress: bool = False, say: Callable[[str], None] = lambda text: None
) -> str:
    """The whole sweep in `processes` processes, this one among them. The store is the same for any number.

    Raises:
        WinnowError: as `bench`; or another process failed, in which case its share is missing and the next run adds it.
    """
    if processes < 1:
        raise WinnowError(f"processes={processes}; use at least 1.")
    if processes > 1 and not sweep.resume:
        raise WinnowError("--fresh works with one process; or give a new --store.")
    with Store(sweep.store, create=True):
        pass  # the tables are there before several processes open them
    spawn = multiprocessing.get_context("spawn")
    shares = [replace(sweep, shard=(i, processes), code=code_hash()) for i in range(processes)]
    others = [spawn.Process(target=_quiet, args=(share,), daemon=True) for share in shares[1:]]
    for other in others:
        other.start()
    try:
        key = run(shares[0], progress=progress, say=say)
        for other in others:
            other.join()
    finally:
        for other in others:
            other.terminate()  # after Ctrl-C or an error here; a finished one does not mind
            other.join()
    failed = sum(other.exitcode != 0 for other in others)
    with Store(sweep.store) as store:
        store.settle(key, FULL_JOB.key)
        refuse_mismatches(store, key)
    if failed:
        raise WinnowError(
            f"{failed} of {processes} processes failed; run the same command again to add what is missing."
        )
    return key


def _quiet(sweep: Sweep) -> None:
    """A share in a separate process. Its exit code says what went wrong; it ends when the first process ends."""
    end_with_parent()  # a batch is written whole or not at all
    quiet()
    try:
        run(sweep)
    except KeyboardInterrupt:
        sys.exit(130)
    except WinnowError as error:
        sys.stderr.write(f"winnow: {error}\n")
        sys.exit(2)


def methods_of(named: Sequence[str] | None) -> tuple[str, ...]:
    """The methods to measure: those that were named, else all that winnow has."""
    return (
        tuple(named)
        if named
        else tuple(entry.slug for entry in picture_methods() if entry.module.startswith("winnow.methods."))
    )


def budgets_of(text: str) -> tuple[str, ...]:
    """`128,64,10%` as budgets."""
    return listed(text, "--keep 128,64,32")


def listed(text: str, example: str) -> tuple[str, ...]:
    """A list of names or numbers with commas between them."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise WinnowError(f"Cannot read {text!r}; write a list such as {example}.")
    return found
