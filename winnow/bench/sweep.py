"""One batch of questions under one plan: asked, read, and checked against the path that users run."""

from __future__ import annotations

import functools
import gc
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from winnow.bench.baselines import PER_QUESTION, Choice, choose, choosing
from winnow.bench.meters import Cost, costs, evidence_recall, judge, merged_into, read_by_layer
from winnow.bench.plans import FULL_JOB, Job
from winnow.bench.requests import Request, Window, joined, without_pixels
from winnow.bench.reuse import Encoded
from winnow.bench.schema import Answer, Overlay
from winnow.bench.shared_layers import SharedLayers
from winnow.bench.shared_pictures import SharedPictures
from winnow.bench.shared_prompts import SharedPrompts
from winnow.bench.tasks import Ask
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import Layout
from winnow.core.ledger import ItemLedger, Ledger
from winnow.core.memory import out_of_memory
from winnow.core.plan import Plan
from winnow.engine.handle import Handle
from winnow.media import MediaError

Part = tuple[tuple[tuple[Ask, ...], ...], list[Job]]  # batches, and the jobs that are asked in them
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}


@dataclass(frozen=True)
class Outcome:
    """What a batch gave; `mismatch` says which question the two paths answer differently ("" is none)."""

    answers: tuple[Answer, ...]
    overlays: tuple[Overlay, ...] = ()
    note: str = ""
    mismatch: str = ""

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.answers + other.answers,
            self.overlays + other.overlays,
            self.note or other.note,
            self.mismatch or other.mismatch,
        )


@dataclass(frozen=True)
class Sweeper:
    """Asks batches of questions.

    Attributes:
        reader: the plan that records what any of the plans needs from the tower.
        layers: what plans share of the tower and of the language model.
        pictures: what plans that act in the tower made of the pictures of a window.
        drawn: ids of the questions whose overlays are kept.
    """

    handle: Handle
    processor: Any
    reader: Plan
    layers: SharedLayers
    pictures: SharedPictures
    max_new_tokens: int
    seed: int = 0
    drawn: frozenset[str] = frozenset()

    def shared(self, requests: Sequence[Request]) -> Callable[[], Encoded]:
        """The encoder outputs of a batch, made when they are first needed."""

        def encode() -> Encoded:
            self.layers.forget()
            with self.layers.under(self.handle.bind(self.reader)):
                return Encoded(self.handle, self.reader, joined(requests, self._pad))

        return functools.cache(encode)

    def parts(self, window: Window, jobs: Sequence[Job]) -> tuple[Part, Part]:
        """The jobs of a window with their batches: of whole pictures where prompts about one picture begin alike."""
        apart: list[Job] = []
        together: list[Job] = []
        for job in jobs:
            (together if self._shares_prompts(job) else apart).append(job)
        return (window.alike, apart), (window.whole, together)

    def _shares_prompts(self, job: Job) -> bool:
        told_apart = self._pad is None or job.baseline in PER_QUESTION
        if told_apart or job is FULL_JOB:  # its first layers are those of plans that act inside the LM
            return False
        return self.layers.shares_prompts(self.handle.bind(job.plan))

    @functools.cached_property
    def _pad(self) -> int | None:
        return getattr(self.processor.tokenizer, "pad_token_id", None)

    def run(
        self, job: Job, cell: int, requests: Sequence[Request], encoded: Callable[[], Encoded], check: bool
    ) -> Outcome:
        """Ask a batch. A batch that does not fit into memory is split; errors of the user's kind become answers.

        Args:
            check: ask again through `model.generate` with the pixels, and compare.
        """
        try:
            return self._ask(job, cell, requests, encoded(), check)
        except WinnowError as error:
            return _failed(cell, requests, _code(error), str(error))
        except Exception as error:
            if not out_of_memory(error):
                raise
        self.layers.forget()
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
        if len(requests) == 1:
            return _failed(cell, requests, "oom", "out of memory with one question")
        parts = requests[: len(requests) // 2], requests[len(requests) // 2 :]
        first, second = (self.run(job, cell, part, self.shared(part), check) for part in parts)
        return first + second

    def _ask(self, job: Job, cell: int, requests: Sequence[Request], encoded: Encoded, check: bool) -> Outcome:
        choices = self.choices(job, requests, encoded.layouts)
        given = without_pixels(encoded.inputs)
        prompts = SharedPrompts([r.ask.image for r in requests]) if self._shares_prompts(job) else None
        with self.handle.using(job.plan), choosing(choices):
            with self.layers.under(self.handle.bind(job.plan), prompts):
                output = None if job.show else self.pictures.under(job.plan, requests)
                output = encoded.under(job.plan) if output is None else output
                shared = given | {"mm_encoder_outputs": {encoded.modality: output}}
                ids, ledger = self._generate(shared | {"generation_config": self._greedy})
            ids = ids[:, given["input_ids"].shape[1] :]
            mismatch = self._compare(requests, choices, ids, ledger) if check else ""
        model = self.handle.model
        spent = costs(ledger, model.config.get_text_config(), model.dtype.itemsize)
        read = [self._read(cell, r, row, ids[row], ledger, spent[row]) for row, r in enumerate(requests)]
        overlays = [
            overlay
            for row, r in enumerate(requests)
            if r.ask.id in self.drawn and (overlay := self._overlay(cell, r, row, ledger)) is not None
        ]
        return Outcome(tuple(read), tuple(overlays), mismatch=mismatch)

    @functools.cached_property
    def _greedy(self) -> GenerationConfig:
        """Where none is given, `generate` builds a configuration of the model at each call, and compares it."""
        return GenerationConfig(max_new_tokens=self.max_new_tokens, **GREEDY)

    def _generate(self, inputs: dict[str, Any]) -> tuple[Tensor, Ledger]:
        ids = self.handle.model.generate(**inputs)
        ledger = self.handle.last
        if ledger is None:
            raise UnsupportedError("the model read no picture in this request, so there is nothing to measure.")
        return ids.cpu(), ledger

    def _compare(
        self, requests: Sequence[Request], choices: Sequence[Choice] | None, ids: Tensor, ledger: Ledger
    ) -> str:
        """The question that the plain path answers otherwise, or of which it keeps other tokens; "" is none.

        Args:
            ids: `[B, S]` what was answered, behind the prompts.
        """
        rows: dict[int, list[int]] = defaultdict(list)
        for row, r in enumerate(requests):
            rows[r.inputs["input_ids"].shape[-1]].append(row)  # nothing is padded there
        for prompt, own in rows.items():
            with choosing(None if choices is None else [choices[row] for row in own]):
                plain = joined([requests[row] for row in own])
                again, other = self._generate(plain | {"max_new_tokens": self.max_new_tokens, **GREEDY})
            for place, row in enumerate(own):
                same = self._said(ids[row]) == self._said(again[place, prompt:])
                if not same or _item(ledger, row).kept.tolist() != _item(other, place).kept.tolist():
                    return requests[row].ask.id
        return ""

    def _said(self, ids: Tensor) -> list[int]:
        """What was said up to its end; others of a batch may have gone on."""
        tokens, ends = ids.tolist(), _ends(self.handle.model)
        return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens)) + 1]

    def choices(self, job: Job, requests: Sequence[Request], layouts: Sequence[Layout]) -> list[Choice] | None:
        """What a baseline keeps of each question."""
        if len(layouts) != len(requests):
            raise UnsupportedError(f"{len(requests)} questions gave {len(layouts)} pictures; each needs exactly one.")
        if not job.baseline:
            return None
        return [
            choose(
                job.baseline, r.ask, layout, min(job.cell.keep or 1, layout.n_content), r.evidence, r.objects, self.seed
            )
            for r, layout in zip(requests, layouts, strict=True)
        ]

    def _read(self, cell: int, r: Request, row: int, ids: Tensor, ledger: Ledger, spent: Cost) -> Answer:
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        ended = bool(torch.isin(ids, torch.tensor(_ends(self.handle.model))).any())
        correct, status = judge(text, r.ask.truth, cut=len(ids) >= self.max_new_tokens and not ended)
        item = _item(ledger, row)
        read = read_by_layer(item, len(ledger.layer_tokens))
        recall = evidence_recall(read, item.layout, r.evidence)
        return Answer(
            cell, r.ask.id, r.ask.type, r.ask.truth, text, correct, None, recall, spent.kept, spent.layer_tokens,
            spent.flops, spent.flops_full, spent.kv_bytes, spent.kv_bytes_full, status,
        )  # fmt: skip

    def _overlay(self, cell: int, r: Request, row: int, ledger: Ledger) -> Overlay | None:
        item = _item(ledger, row)
        place = item.layout.place[item.layout.content]
        if len(np.unique(place[:, :2], axis=0)) != 1:
            return None  # several grids over one picture are not drawn as one
        grid = int(place[:, 2].max()) + 1, int(place[:, 3].max()) + 1
        kept, merged = merged_into(item)
        return Overlay(cell, r.ask.id, kept, merged, grid)


def _item(ledger: Ledger, row: int) -> ItemLedger:
    return next(item for item in ledger.items if item.row == row)


def _ends(model: Any) -> list[int]:
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _failed(cell: int, requests: Sequence[Request], code: str, note: str) -> Outcome:
    answers = (
        Answer(cell, r.ask.id, r.ask.type, r.ask.truth, "", False, *(None,) * 8, status=f"error:{code}")
        for r in requests
    )
    return Outcome(tuple(answers), note=json.dumps(note, ensure_ascii=False)[1:-1][:400])


def _code(error: WinnowError) -> str:
    if isinstance(error, UnsupportedError):
        return "unsupported"
    return error.code if isinstance(error, MediaError) else "invalid"
