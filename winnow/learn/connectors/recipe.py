"""How a connector is trained: through the frozen language model, on the answers to questions about clips."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from winnow.core.errors import WinnowError
from winnow.core.registry import method_class
from winnow.core.step import State
from winnow.core.view import View
from winnow.learn.clip_evaluate import ROW, answered_right
from winnow.learn.clip_reading import read
from winnow.learn.connectors.clips import GRID, Frozen, Row, rows_of
from winnow.learn.connectors.output import Output, joined
from winnow.learn.fitting import Phase, Record
from winnow.learn.packing import IGNORED, Pack, pack
from winnow.parts.learned import UNTRAINED
from winnow.reference.video import token_ids
from winnow.world.clips import TYPES, Clip

AT_ONCE = 24  # rows that are answered together when it is measured

Give = Callable[[Sequence[Row]], Output]
"""From rows to what the language model gets of them."""


class Recipe:
    """The recipe of one connector; see the package for what a subclass says.

    Attributes:
        slug: of the method.
        settings: of the method, for which its weights are.
        sizes: of the module, as the method's `make` takes them.
        clips: how many are recorded; the last eighth of them is measured.
        steps, batch, rate: steps of training, clips of a step, and the highest rate.
        each: questions about a clip in a step, at most.
        also: other settings at which the same weights are measured.
        name: the method with settings that are not those of its training; empty where there are none.
        asks: whether the method reads the question.
        generator: of the random numbers of a step.
    """

    slug: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}
    sizes: ClassVar[dict[str, int]] = {}
    clips: ClassVar[int] = 1200
    steps: ClassVar[int] = 300
    batch: ClassVar[int] = 12
    rate: ClassVar[float] = 1e-3
    each: ClassVar[int] = 3
    also: ClassVar[tuple[dict[str, Any], ...]] = ()
    name: ClassVar[str] = ""

    def __init__(self, frozen: Frozen, scale: float = 1.0) -> None:
        self.frozen, self.scale = frozen, scale
        method = method_class(self.slug).configured(**self.settings, weights=UNTRAINED)
        self.method, steps = method.bind(frozen.info)
        found = [step for step in steps if step.at.name == "projected"]
        if len(found) != 1:
            raise WinnowError(f"{self.slug} has {len(found)} steps at projected; a connector that is trained has one.")
        self.step = found[0]
        self.asks = any(signal.reads_question for signal in self.step.needs)
        self.records: Sequence[Record] = ()
        self.generator = torch.Generator()

    @classmethod
    def at(cls, **settings: Any) -> type[Recipe]:
        """The same recipe with other settings of the method."""
        said = ",".join(f"{key}={value}" for key, value in settings.items())
        name = f"{cls.slug}:{said}" if said else ""
        return type("Recipe", (cls,), {"settings": {**cls.settings, **settings}, "name": name})

    def make(self) -> nn.Module:
        """The module of these sizes."""
        made: nn.Module = self.method.build(self.frozen.info)
        return made

    def record(self, seen: Clip) -> Record:
        return self.frozen.record(seen)

    def output(self, module: nn.Module, view: View) -> Output:
        """What the method makes of a view's rows; its `module` is that of the view as well."""
        return Output.of(self.step.act(view, State())[0], view)

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        self.records = records
        return [Phase("answers", max(8, round(self.steps * self.scale)), self.batch, self.rate, self._loss)]

    def _loss(self, module: nn.Module, batch: list[int]) -> Tensor:
        own = [self.records[i] for i in batch]
        self.generator.manual_seed(random.Random(repr(batch)).getrandbits(60))  # a run that goes on draws the same
        return self.answers(module, rows_of(own, self.asks, self.each, batch))

    def answers(self, module: nn.Module, rows: Sequence[Row]) -> Tensor:
        """The loss of the answers' tokens, and the method's own."""
        output = self.outputs(module, rows)
        with torch.autocast("cpu", torch.bfloat16):
            logits, packed = answering(self.frozen, rows, output)
        wanted = packed.labels != IGNORED
        return cross_entropy(logits[wanted].float(), packed.labels[wanted]) + sum(output.losses.values())

    def outputs(self, module: nn.Module, rows: Sequence[Row]) -> Output:
        """Rows with signals of equal shapes go through the method together, as in the engine."""
        views = self.frozen.views(rows, self.step, module)
        return joined([(own, self.output(module, view)) for own, view in views])

    @torch.no_grad()
    def measure(self, module: nn.Module, records: Sequence[Record]) -> dict[str, float]:
        """Accuracy on held-out clips, and the tokens of a clip."""
        rows = rows_of(records, self.asks)
        right, tokens = right_of(self.frozen, rows, lambda own: self.outputs(module, own))
        return {"accuracy": sum(right) / len(right), "tokens": tokens}


def answering(frozen: Frozen, rows: Sequence[Row], output: Output) -> tuple[Tensor, Pack]:
    """`[b, T, vocabulary]` logits of all questions behind what a connector gives, and how they are packed."""
    packed = pack([row.asked for row in rows], ROW, types=TYPES, ids=token_ids)
    hidden, _ = read(frozen.model, output.tokens, output.at, GRID, packed, there=output.there)
    logits: Tensor = frozen.model.lm_head(hidden)
    return logits, packed


@torch.no_grad()
def right_of(frozen: Frozen, rows: Sequence[Row], give: Give) -> tuple[list[bool], float]:
    """Which questions are answered right, row by row, and the mean number of tokens of a row."""
    marks: list[bool] = []
    tokens = 0
    for at in range(0, len(rows), AT_ONCE):
        own = rows[at : at + AT_ONCE]
        output = give(own)
        logits, packed = answering(frozen, own, output)
        tokens += int(output.counts.sum())
        for row in answered_right(logits, packed, [len(row.asked) for row in own]):
            marks += row
    return marks, tokens / len(rows)
