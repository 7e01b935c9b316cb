"""What happens at each step of `generate`, row by row: how a token is chosen, and what is done with it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from winnow.serve.job import Done, Job, Text
from winnow.serve.pieces import Pieces
from winnow.serve.schema import Sampling


class Chooser(LogitsProcessor):
    """Leaves each row that samples one token, drawn by a generator of its own: a row is the same in every batch."""

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self.rows = rows
        self.generators = [torch.Generator().manual_seed(_seed(row)) for row in rows]

    def __call__(self, input_ids: Int[Tensor, "b s"], scores: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        for i, (row, generator) in enumerate(zip(self.rows, self.generators, strict=True)):
            if row.temperature > 0:
                token = _drawn(scores[i], row, generator)
                scores[i] = float("-inf")
                scores[i, token] = 0.0
        return scores


def _seed(row: Sampling) -> int:
    return secrets.randbits(62) if row.seed is None else row.seed % 2**63


def _drawn(scores: Float[Tensor, " v"], row: Sampling, generator: torch.Generator) -> int:
    """A token from the smallest set of the likeliest ones that has `top_p` of the probability, at a temperature."""
    # In float64 on the CPU: a temperature near 0 overflows nothing, and a seed gives the same on every device.
    best, order = (scores.double().cpu() / row.temperature).sort(descending=True, stable=True)
    chances = best.softmax(-1)
    chances[chances.cumsum(-1) - chances >= row.top_p] = 0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


class Row:
    """A row of a batch: one request, and its answer so far."""

    def __init__(self, job: Job, tokenizer: Any, ends: frozenset[int]) -> None:
        self.job, self.ends, self.count = job, ends, 0
        self.pieces = Pieces(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), job.sampling.stop)

    @property
    def open(self) -> bool:
        return not self.job.over

    def take(self, token: int) -> None:
        """The next token of the answer."""
        self.count += 1
        if token in self.ends:
            self._finish("stop")
            return
        self._send(self.pieces.add(token))
        if self.pieces.stopped:
            self._finish("stop")
        elif self.count >= self.job.sampling.max_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self._send(self.pieces.rest())
        self.job.say(Done(reason, self.count))

    def _send(self, piece: str) -> None:
        if piece:
            self.job.say(Text(piece))


class Listener(StoppingCriteria):
    """Hands each new token to its row, and ends the rows that are over. A step is the longest that a client is late.

    Args:
        before: is called once, between the prompt and the first token.
    """

    def __init__(self, rows: Sequence[Row], before: Callable[[], None]) -> None:
        self.rows, self.before = rows, before
        self.begun = False

    def __call__(self, input_ids: Int[Tensor, "b s"], scores: Any, **_: Any) -> Bool[Tensor, " b"]:
        if not self.begun:
            self.begun = True
            self.before()
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.open:
                row.take(token)
        return torch.tensor([not row.open for row in self.rows], device=input_ids.device)
