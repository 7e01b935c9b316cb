"""Methods that exist only to test the engine, one for each kind of action and point; and short ways to call a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from byhand import top
from torch import Tensor, nn

from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.select import top_k
from winnow.core.signal import Signal
from winnow.core.step import Action, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.signals.language import LMAttention, LMAttentionMass
from winnow.signals.vision import VisionAttention

STEPS = 6
HALF = Budget("50%")
MIDDLE = VisionAttention(1, query="all")


def score(tokens: Tensor) -> Tensor:
    """`[…, N, D]` → `[…, N]`: a number for each token that only its own row decides."""
    width = tokens.shape[-1]
    direction = torch.cos(torch.arange(width, dtype=torch.float32, device=tokens.device) * 1.7)
    return tokens.float() @ direction


@dataclass(frozen=True)
class Pick(Method):
    """Keeps the tokens with the largest score of their own row, at any point."""

    keep: Budget = HALF
    at: str = "projected"  # type: ignore[misc]
    separators: str = "keep"
    slug: ClassVar[str] = "pick"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point.of(self.at), self._pick),)

    def _pick(self, view: View, state: State) -> tuple[Action, State]:
        count = self.keep.of(view)
        lanes = [top(score(lane), count) for lane in view.tokens]
        return Reduce(Reduction.select(torch.stack(lanes), view.n), self.separators), state


@dataclass(frozen=True)
class Halve(Method):
    """Merges neighbours two by two into their mean; an odd last token stays alone."""

    at: str = "projected"  # type: ignore[misc]
    slug: ClassVar[str] = "halve"

    def reduce(self, view: View) -> Reduction:
        m = (view.n + 1) // 2
        cluster = (torch.arange(view.n, device=view.tokens.device) // 2).expand(view.b, -1)
        size = torch.bincount(cluster[0], minlength=m)
        weight = (1 / size.float())[cluster]
        representative = (2 * torch.arange(m, device=cluster.device)).expand(view.b, -1)
        return Reduction.assign(cluster, weight, m=m, representative=representative)


@dataclass(frozen=True)
class Received(Method):
    """At `projected`, by a signal of the tower: keeps the tokens that a vision block attends to."""

    keep: Budget = HALF
    row: VisionAttention = MIDDLE
    slug: ClassVar[str] = "received"

    def score(self, view: View) -> Tensor:
        return view[self.row]


@dataclass(frozen=True)
class Drawn(Method):
    """Keeps tokens that the view's own generator draws."""

    keep: Budget = HALF
    slug: ClassVar[str] = "drawn"

    def score(self, view: View) -> Tensor:
        return view.rand(view.n)


@dataclass(frozen=True)
class Folded(Method):
    """At `features`, in an order of its own: the means of neighbours, [CLS] among them, the last pair first."""

    at: str = "features"  # type: ignore[misc]
    slug: ClassVar[str] = "folded"
    separators: ClassVar[str] = "drop"  # type: ignore[misc]
    identity: ClassVar[None] = None

    def reduce(self, view: View) -> Reduction:
        m = (view.n + 1) // 2
        cluster = (m - 1 - torch.arange(view.n, device=view.tokens.device) // 2).expand(view.b, -1)
        size = torch.bincount(cluster[0], minlength=m)
        representative = (2 * torch.arange(m - 1, -1, -1, device=cluster.device)).expand(view.b, -1)
        return Reduction.assign(cluster, (1 / size.float())[cluster], m=m, representative=representative, ordered=False)


@dataclass(frozen=True)
class Tapped(Method):
    """Before an LM layer, by what was read of the layer before it while it ran."""

    keep: Budget = HALF
    layer: int = 2
    slug: ClassVar[str] = "tapped"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        row = LMAttention(self.layer - 1)
        run = lambda view, state: top_k(view[row], self.keep.of(view), view)  # noqa: E731
        return (Step(Point("layers", self.layer), run, (row,)),)


@dataclass(frozen=True)
class Probed(Method):
    """Before three LM layers, each time by what the layer is about to attend to."""

    shares: tuple[Budget, ...] = (HALF, Budget("25%"), Budget("12.5%"))
    slug: ClassVar[str] = "probed"
    identity: ClassVar[dict[str, Any]] = {"shares": ("100%",) * 3}

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        rows = [LMAttention(layer) for layer in (1, 2, 3)]
        return tuple(
            Step(
                Point("layers", row.layer), lambda view, state, r=row, k=keep: top_k(view[r], k.of(view), view), (row,)
            )
            for row, keep in zip(rows, self.shares, strict=True)
        )


@dataclass(frozen=True)
class Forgotten(Method):
    """Few tokens at `projected`, and all or none of an item before the last layer, by two shares of attention."""

    keep: Budget = Budget(9)
    tau: float = 0.5
    slug: ClassVar[str] = "forgotten"
    identity: ClassVar[dict[str, Any]] = {"keep": "100%", "tau": 0.0}

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        masses = LMAttentionMass(2, "question", "items"), LMAttentionMass(2, "items", "question")
        pick = Pick(self.keep).steps(info)[0]
        return (pick, Step(Point("layers", 3), lambda view, state: self._forget(view, *masses), masses))

    def _forget(self, view: View, *masses: LMAttentionMass) -> Action:
        gone = torch.stack([view[mass] < self.tau for mass in masses]).all(0).tolist()
        kept = torch.tensor([[not g] * view.n for g in gone], device=view.tokens.device)
        return Reduce(Reduction.select(kept, counts=tuple(0 if g else view.n for g in gone)))


@dataclass(frozen=True)
class Look(Method):
    """Changes nothing; keeps the views that it was given."""

    needs: tuple[Signal, ...] = ()
    at: str = "projected"  # type: ignore[misc]
    views: list[View] = field(default_factory=list, compare=False, metadata={"setting": False})
    slug: ClassVar[str] = "look"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point.of(self.at), self._look, self.needs),)

    def _look(self, view: View, state: State) -> tuple[Action, State]:
        self.views.append(view)
        return Observe(), state

    def seen(self, signal: Signal) -> list[Tensor]:
        """The signal for each item, in the order in which the engine showed them."""
        return [lane for view in self.views for lane in view[signal]]


@dataclass(frozen=True)
class Call(Method):
    """Calls a function with each view, and keeps everything."""

    function: Callable[[View], Any] = field(default=lambda view: None, compare=False, metadata={"setting": False})
    at: str = "projected"  # type: ignore[misc]
    slug: ClassVar[str] = "call"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point.of(self.at), self._call),)

    def _call(self, view: View, state: State) -> tuple[Action, State]:
        self.function(view)
        return Observe(), state


@dataclass(frozen=True)
class Watched(Method):
    """Another method, with a count of the items that its steps were run on."""

    inner: Method = field(default_factory=Pick)
    items: list[int] = field(default_factory=list, compare=False, metadata={"setting": False})
    slug: ClassVar[str] = "watched"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return tuple(dataclasses.replace(step, run=self._watch(step)) for step in self.inner.bind(info)[1])

    def _watch(self, step: Step) -> Callable[[View, State], tuple[Action, State]]:
        def run(view: View, state: State) -> tuple[Action, State]:
            self.items.append(view.b)
            return step.run(view, state)

        return run


@torch.no_grad()
def forward(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model(**inputs, **options)


@torch.no_grad()
def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any) -> Any:
    """Greedy decoding (unless the options say otherwise) with the raw logits of each step."""
    defaults = {"do_sample": False, "max_new_tokens": steps, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **defaults | options)


def new_tokens(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    """`[B, T]` what was generated."""
    return output.sequences[:, inputs["input_ids"].shape[1] :]


def step_logits(output: Any) -> Tensor:
    """`[B, T, vocabulary]`."""
    return torch.stack(output.logits, 1)
