"""The frozen model that learned methods are trained on: its questions, what its layers are shown, and soft pruning."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from winnow.bench.requests import request, without_pixels
from winnow.bench.reuse import Encoded, listening
from winnow.bench.tasks import Ask, Task, data_task, world_task
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.signal import Signal
from winnow.core.step import Action, Observe, State, Step
from winnow.core.view import View
from winnow.engine.handle import Handle
from winnow.engine.spans import question_span, template_suffix

FIRST = 1 << 44  # scenes of the train split from this seed on: the shipped model has seen none of them
APART = 1 << 32  # seeds of scenes between two seeds of a run
PER_SCENE = 3


def questions(count: int, seed: int, data: Path | None = None) -> Task:
    """What is asked: scenes of the train split, of which bench and tests see none, or the rows of a data file."""
    if data is not None:
        return data_task(data, count)
    return world_task(count, split="train", seed=FIRST + seed * APART, per_scene=PER_SCENE)


@dataclass(frozen=True)
class Recorder(Method):
    """Changes nothing, and keeps the latest view of each of its points.

    Args:
        looks: point and signals.
    """

    looks: tuple[tuple[str, tuple[Signal, ...]], ...] = field(default=(), metadata={"setting": False})
    seen: dict[str, View] = field(default_factory=dict, compare=False, metadata={"setting": False})

    slug: ClassVar[str] = "recorder"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return tuple(Step(Point.of(point), self._see(point), signals) for point, signals in self.looks)

    def _see(self, point: str) -> Callable[[View, State], tuple[Action, State]]:
        def run(view: View, state: State) -> tuple[Action, State]:
            self.seen[point] = view
            return Observe(), state

        return run


@dataclass(frozen=True, eq=False)
class Example:
    """A question, as the model takes it.

    Attributes:
        inputs: of the prompt, pixels included.
        answer: ids of the true answer and of the end.
        encoded: its picture, encoded once.
    """

    ask: Ask
    inputs: dict[str, Tensor]
    answer: Tensor
    encoded: Encoded

    @property
    def answered(self) -> dict[str, Tensor]:
        """The prompt with the answer behind it, but for its last token, which nothing reads."""
        return {name: self._longer(name, x) for name, x in self.inputs.items()}

    def _longer(self, name: str, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape != self.inputs["input_ids"].shape:
            return x
        tail = self.answer[None, :-1]
        return torch.cat(
            [x, (tail if name == "input_ids" else torch.full_like(tail, name == "attention_mask")).to(x)], 1
        )


class Frozen:
    """A compressed model with its questions.

    Args:
        handle: of the model, whose weights get no gradients from here on.
    """

    def __init__(self, handle: Handle, processor: Any, task: Task) -> None:
        self.handle, self.processor, self.task = handle, processor, task
        handle.model.requires_grad_(False)
        self.ears = listening(handle, [])
        self.suffix = template_suffix(processor)

    def examples(self, start: int, end: int) -> Iterator[Example]:
        """The questions from `start` to `end`; neighbours that share a picture share its encoding."""
        model, tokenizer = self.handle.model, self.processor.tokenizer
        for _, asks in itertools.groupby(self.task.questions[start:end], lambda ask: ask.image):
            encoded = None
            for ask in asks:
                inputs = request(model, self.processor, self.task, ask).inputs
                encoded = encoded or Encoded(self.handle, self.ears, inputs)
                ids = tokenizer(ask.truth, add_special_tokens=False)["input_ids"]
                answer = torch.tensor([*ids, tokenizer.eos_token_id], device=model.device)
                yield Example(ask, inputs, answer, encoded)

    def run(self, example: Example, plan: Plan | Method = Plan(()), *, answer: bool = False, **more: Any) -> Any:  # noqa: B008
        """A forward of the prompt, or with the answer behind it, under a plan."""
        plan = Plan.of(plan)
        inputs = without_pixels(example.answered if answer else example.inputs)
        with self.handle.using(plan):
            encoded = example.encoded.under(plan)
            return self.handle.model(**inputs, mm_encoder_outputs={"image": encoded}, use_cache=False, **more)

    def said(self, example: Example, plan: Plan | Method = Plan(())) -> Tensor:  # noqa: B008
        """`[A, vocabulary]` the logits of the answer's tokens."""
        return self.run(example, plan, answer=True).logits[0, -len(example.answer) :].float()

    def slots(self, example: Example) -> tuple[Tensor, Tensor]:
        """Where the picture's tokens and those of the question stand in the prompt."""
        ids = example.inputs["input_ids"][0]
        visual = (ids == self.handle.bound.token_ids["image"]).nonzero()[:, 0]
        start, end = question_span(ids, int(visual[-1]) + 1, len(ids), self.suffix)
        return visual, torch.arange(start, end, device=ids.device)


@contextmanager
def soft_keys(layers: Sequence[nn.Module], gate: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While it holds, keys of the language model weigh less: a prunable form of pruning, through which gradients flow.

    A weight of 0 (a logarithm of −inf) is what removing the token there would be, at kept positions; one of 1 changes
    nothing.

    Args:
        gate: from a layer's number and the hidden states `[B, P, D]` that enter it, the logarithms `[B, P]` of the
            weights of keys from this layer on, or None. They add up over the layers.
    """
    total: list[Tensor] = []

    def enter(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number == 0:
            total.clear()
        added = gate(number, hidden)
        if added is not None:
            total[:] = [sum(total, added)]
        if not total:
            return args, kwargs
        mask = additive(kwargs.get("attention_mask"), hidden) + total[0][:, None, None].to(hidden.dtype)
        return args, {**kwargs, "attention_mask": mask.clamp_min(torch.finfo(hidden.dtype).min)}

    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, n=n: enter(n, args, kwargs), with_kwargs=True)
        for n, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def additive(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """A mask of attention as numbers that are added to logits; None is causal."""
    p = hidden.shape[1]
    if mask is None:
        mask = torch.ones(p, p, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are."""
    return next(module.parameters()).device
