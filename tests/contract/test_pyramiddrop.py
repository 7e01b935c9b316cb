"""PyramidDrop (arXiv 2410.17247) in the engine, in a form that remembers by itself how many tokens entered the LM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import zoo
from byhand import Entry, Hand, Reference, Seen, cut, top
from cases import check_against_hand, same
from probes import generate
from torch import Tensor

import winnow
from winnow.contract import Action, Budget, LMAttention, Method, Observe, Point, Reduction, State, Step, View
from winnow.core.plan import Plan


@dataclass(frozen=True)
class PyramidDrop(Method):
    """At each cut keep the tokens that the last prompt token attends to in the layer that comes next."""

    ratios: tuple[Budget, ...] = (Budget("50%"), Budget("25%"), Budget("12.5%"))

    slug = "remembering-pyramid"
    rounding = "floor"

    def steps(self, info):
        cuts = [
            Step(Point("layers", k), partial(self.cut, LMAttention(k), ratio), (LMAttention(k),))
            for k, ratio in enumerate(self.ratios, 1)
        ]
        return (Step(Point("layers", 0), self.enter), *cuts)

    @staticmethod
    def enter(view: View, state: State) -> tuple[Action, State]:
        """What enters the LM: behind any step at the connector. `view.n_lm` would say it, too."""
        return Observe(), replace(state, item=state.item | {"entered": torch.full((view.b,), view.n)})

    @staticmethod
    def cut(attention: LMAttention, ratio: Budget, view: View, state: State) -> tuple[Reduction, State]:
        counts = tuple(min(view.n, ratio.of(n)) for n in state.item["entered"].tolist())
        rank = view[attention].argsort(-1, descending=True).argsort(-1)
        return Reduction.select(rank < torch.tensor(counts)[:, None], counts=counts), state


@dataclass(frozen=True)
class FirstHalf(Method):
    """At the connector, keep the first half of the tokens: what another method may have done before."""

    slug = "first-half"
    identity = None

    def reduce(self, view: View) -> Reduction:
        return Reduction.select(torch.arange(view.n // 2).expand(view.b, -1), view.n)


def by_hand(halved: bool, compact: bool, reference: Reference, sample: dict, entry: Entry) -> Hand:
    def first(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        return rows[: len(rows) // 2]

    def at(layer: int, share: float):
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            score = reference.lm_attention(layer, seen[-1], entry, compact)[:, -1].mean(0)
            entered = len(entry.content[number]) // (2 if halved else 1)
            return rows[top(score[rows], max(1, int(entered * share)))]

        return cut(entry, choose)

    cuts = {1: at(1, 0.5), 2: at(2, 0.25), 3: at(3, 0.125)}
    return Hand(entry, cuts | ({0: cut(entry, first)} if halved else {}))


@pytest.mark.parametrize("halved", [False, True], ids=["alone", "behind-another"])
@pytest.mark.parametrize(
    ("build", "positions"), [("llava_next", "keep"), ("llava_next", "compact"), ("qwen2_5_vl", "keep")]
)
def test_equals_the_layers_with_rows_cut_by_hand(build, positions, halved):
    """Ratios refer to what enters the LM, also where another method has halved that."""
    plan = Plan((*((FirstHalf(),) if halved else ()), PyramidDrop()), positions=positions)
    compact = positions == "compact"
    parts = zoo.samples(build, zoo.MIXED)
    check_against_hand(zoo.model(build), parts, plan, partial(by_hand, halved, compact), compact=compact)


def test_shares_of_all_are_the_identity():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.MIXED)
    said = generate(model, inputs)
    with winnow.compress(model, PyramidDrop(ratios=("100%",) * 3)):
        assert same(generate(model, inputs), said)
