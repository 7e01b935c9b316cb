"""A method under test, and views with random signals for each of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.kv_method import CacheMethod
from winnow.core.method import Method
from winnow.core.reduction import Reduction
from winnow.core.step import Emit, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.testing.pictures import WITH_CLS, WITHOUT_CLS, Picture


def expect(condition: bool, message: str) -> None:
    """Fail with a message that says what came and what should have."""
    if not condition:
        raise AssertionError(message)


@dataclass(frozen=True)
class Act:
    """A step under test: its number in the method, the width of its tokens, and what the method's `build` made."""

    number: int
    step: Step
    width: int
    module: Any = None


@dataclass(frozen=True)
class Subject:
    """A method under test.

    Args:
        kind: its class.
        settings: those that it needs beside its defaults.
        infos: models to try; those that it does not support are left out, and one must remain.
    """

    kind: type[Method]
    settings: Mapping[str, Any] = field(default_factory=dict)
    infos: tuple[ModelInfo, ...] = (WITH_CLS, WITHOUT_CLS)

    def method(self, **settings: Any) -> Method:
        return self.kind.configured(**{**self.settings, **settings})

    @property
    def has_keep(self) -> bool:
        return "keep" in self.kind.settings()

    def acts(self, **settings: Any) -> Iterator[Act]:
        """The steps of the method on each model that supports it."""
        method, supported = self.method(**settings), 0
        for info in self.infos:
            try:
                resolved, steps = method.bind(info)
            except UnsupportedError:
                continue
            supported += 1
            module = resolved.build(info)
            # What a method of pictures does to the cache as well has other views.
            seen = [step for step in steps if step.at.name != "kv" or issubclass(self.kind, CacheMethod)]
            yield from (Act(number, step, info.width, module) for number, step in enumerate(seen))
        expect(supported > 0, f"{self.kind.__name__} runs on none of {[info.model for info in self.infos]}")

    def view(self, act: Act, picture: Picture, *, b: int = 2, left: int | None = None, seed: int = 0) -> View:
        """A view with random tokens and signals; `left`: tokens that an earlier method has left over, at random."""
        step = act.step
        generator = torch.Generator().manual_seed(seed)
        inside = step.at.name in ("features", "blocks")
        layout = {"features": picture.tower, "blocks": picture.tile}.get(step.at.name, picture.lm)
        n = layout.n if inside else layout.n_content if left is None else left
        # At `features` a signal has values for all tokens, [CLS] included, or for the patches alone.
        alone = step.at.name == "features"
        per_token = lambda signal: layout.n_content if alone and not signal.covers_prefix else n  # noqa: E731
        signals = step.signals(lambda signal: signal.sample(generator, b, per_token(signal)))
        ids = torch.stack(
            [torch.randperm(layout.n if inside else layout.n_content, generator=generator)[:n] for _ in range(b)]
        )
        tokens = torch.randn(b, n, act.width, generator=generator)
        n_visual = (layout if step.at.name == "blocks" else picture.lm).n_content
        return View(tokens, layout, ids.sort(1).values, n_visual, signals, seed=seed, module=act.module)


def answer(step: Step, view: Any) -> Any:
    """What a step asks for that remembers nothing."""
    return step.act(view, State())[0]


def run(step: Step, view: View, state: State | None = None) -> Reduction | None:
    """What a step asks for: its map, or None if it only looked."""
    action, _ = step.act(view, state or State())
    if isinstance(action, Observe):
        return None
    if isinstance(action, Emit):
        return action.provenance
    expect(isinstance(action, Reduce), f"these checks know Reduce, Emit and Observe, not {type(action).__name__}")
    return action.reduction  # type: ignore[attr-defined]


def emitted(step: Step, view: View, state: State | None = None) -> Tensor | None:
    """`[b, M, D]` the new tokens of a step that emits them."""
    action, _ = step.act(view, state or State())
    return action.tokens if isinstance(action, Emit) else None
