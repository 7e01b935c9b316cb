"""Recall under a plan for the KV cache: is the answer still right after the cache was made smaller?

Asked in two ways that must not be mixed. Query-aware: context and question are prefilled together, so a method can keep
what the question needs. Query-agnostic: the context is prefilled alone, its cache is compressed, and only then come the
questions, one after the other on what is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.world.recall import TASKS, Recall, draw

BATCH = 8
FULL = "full"  # the plan of a model that is left alone
READ = 0.75  # share of a filler text that is prefilled before its perplexity is measured


@dataclass(frozen=True)
class Answer:
    """What was answered to question number `place` of the sample of `seed`."""

    seed: int
    place: int
    said: tuple[int, ...]
    truth: tuple[int, ...]

    @property
    def right(self) -> bool:
        return self.said == self.truth


def measure(
    model: Any,
    plan: Any,
    task: str,
    n: int = 64,
    length: int = 512,
    aware: bool = False,
    *,
    split: str = "test",
    seed: int = 0,
    **counts: int,
) -> list[Answer]:
    """Ask all questions of `n` samples under a plan, decoding greedily.

    Args:
        model: a text model that knows the words of the recall tasks; see `winnow.reference.text`.
        plan: as `winnow.compress` takes it; "full" or None: the model as it is.
        aware: prefill context and question together; otherwise the context alone.
        seed: of the first sample.
        counts: `facts` and `asks`, as `winnow.world.recall.draw` takes them.
    """
    if task not in TASKS or task == "filler":
        raise WinnowError(f"{task!r} asks nothing; the tasks with questions are {', '.join(TASKS[:-1])}")
    samples = _samples(task, n, length, split, seed, counts)
    found: list[Answer] = []
    with under(model, plan):
        for start in range(0, n, BATCH):
            part = samples[start : start + BATCH]
            said = _aware(model, part) if aware else _agnostic(model, part)
            for row, sample in enumerate(part):
                found += [
                    Answer(seed + start + row, place, said[place][row], asked.answer)
                    for place, asked in enumerate(sample.asked)
                ]
    return found


def accuracy(answers: Sequence[Answer]) -> float:
    """The share of right answers."""
    return sum(answer.right for answer in answers) / len(answers)


@torch.no_grad()
def perplexity(model: Any, plan: Any, n: int = 16, length: int = 512, *, split: str = "test", seed: int = 0) -> float:
    """Perplexity of the last quarter of filler texts, word by word on the cache of the rest that the plan left."""
    samples = _samples("filler", n, length, split, seed, {})
    losses: list[Tensor] = []
    with under(model, plan):
        for start in range(0, n, BATCH):
            ids = _rows(model, [sample.context for sample in samples[start : start + BATCH]])
            read = round(READ * length)
            out = model(input_ids=ids[:, :read], use_cache=True)
            for at in range(read, length):
                losses.append(F.cross_entropy(out.logits[:, -1].float(), ids[:, at], reduction="none"))
                out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
    return math.exp(torch.cat(losses).mean().item())


def _samples(task: str, n: int, length: int, split: str, seed: int, counts: dict[str, int]) -> list[Recall]:
    if n < 1:
        raise WinnowError(f"n={n}; measure on at least 1 sample")
    return [draw(task, seed + i, length, split, **counts) for i in range(n)]


def under(model: Any, plan: Any) -> Any:
    """The model with the plan attached, for a `with` block."""
    if plan is None or plan == FULL:
        return nullcontext()
    from winnow.engine.compress import compress

    return compress(model, plan)


def _rows(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, device=model.device)


@torch.no_grad()
def _agnostic(model: Any, samples: Sequence[Recall]) -> list[list[tuple[int, ...]]]:
    """Answers by question, then by sample: a conversation on the cache of the context."""
    cache = model(input_ids=_rows(model, [sample.context for sample in samples]), use_cache=True).past_key_values
    said = []
    for asked in zip(*(sample.asked for sample in samples), strict=True):
        question = _rows(model, [one.question for one in asked])
        answer, cache = _decoded(model, question, cache, len(asked[0].answer))
        said.append(answer)
    return said


@torch.no_grad()
def _aware(model: Any, samples: Sequence[Recall]) -> list[list[tuple[int, ...]]]:
    """As `_agnostic`, but each question with the context in front of it, on a cache of its own."""
    said = []
    for asked in zip(*(sample.asked for sample in samples), strict=True):
        rows = [sample.context + one.question for sample, one in zip(samples, asked, strict=True)]
        said.append(_decoded(model, _rows(model, rows), None, len(asked[0].answer))[0])
    return said


def _decoded(model: Any, ids: Tensor, cache: Any, count: int) -> tuple[list[tuple[int, ...]], Any]:
    """The `count` likeliest next tokens of each row of `ids`, one by one, and the cache that has read them."""
    given = []
    for _ in range(count):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        given.append(ids)
    # The last token is read as well, so that a later question finds the conversation whole.
    cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    return [tuple(row) for row in torch.cat(given, 1).tolist()], cache
