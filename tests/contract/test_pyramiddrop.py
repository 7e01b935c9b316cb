"""PyramidDrop (arXiv 2410.17247): three cuts before LM layers, ratios of the count that enters the LM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from winnow.core.budget import Budget
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import Keep, Reduce, State, Step
from winnow.core.view import View
from winnow.signals.language import LMAttention

from .interpreter import Interpreter
from .layouts import picture
from .toy import Picture, ToyVLM, causal, randn


@dataclass(frozen=True)
class PyramidDrop(Method):
    """At each cut keep the tokens that the last prompt token attends to in the layer that comes next."""

    layers: tuple[int, ...] = (2, 4, 6)
    ratios: tuple[str, ...] = ("50%", "25%", "12.5%")

    def steps(self, info):
        cuts = [
            Step(Point("layers", k), partial(self.cut, LMAttention(k), Budget(ratio)), (LMAttention(k),))
            for k, ratio in zip(self.layers, self.ratios, strict=True)
        ]
        return (Step(Point("layers", 0), self.enter), *cuts)

    @staticmethod
    def enter(view: View, state: State) -> tuple[Keep, State]:
        """Ratios refer to what enters the LM: after any step at the connector, which `view.n_visual` is not."""
        return Keep(), replace(state, item=state.item | {"entered": torch.full((view.b,), view.n)})

    @staticmethod
    def cut(attention: LMAttention, ratio: Budget, view: View, state: State) -> tuple[Reduce, State]:
        counts = tuple(min(view.n, ratio.of(n, rounding="floor")) for n in state.item["entered"].tolist())
        rank = view[attention].argsort(-1, descending=True).argsort(-1)
        return Reduce(Reduction.select(rank < torch.tensor(counts)[:, None], counts=counts)), state


@dataclass(frozen=True)
class FirstHalf(Method):
    """At the connector, keep the first half of the tokens: what another method may have done before."""

    def reduce(self, view: View) -> Reduction:
        return Reduction.select(torch.arange(view.n // 2).expand(view.b, -1), view.n)


def by_hand(model: ToyVLM, sample: list[Tensor | Picture], layers, ratios, compact: bool) -> tuple[Tensor, list[int]]:
    """One sample in a loop over plain layers: the last state, and the tokens that each layer read."""
    parts, items, start = [], [], 0
    for part in sample:
        rows = part if isinstance(part, Tensor) else model.projector(model.encode(part.patches[0])[1:])
        if not isinstance(part, Tensor):
            items.append(list(range(start, start + len(rows))))
        parts.append(rows)
        start += len(rows)
    x, alive, entered, read = torch.cat(parts), list(range(start)), [len(item) for item in items], []
    for k, layer in enumerate(model.layers):
        pos = torch.arange(len(alive)) if compact else torch.tensor(alive)
        if k in layers:
            q, key, _ = layer.qkv(layer.norm1(x), pos)
            row = layer.weights(q, key, causal(len(x), len(x), x.dtype)).mean(0)[-1]
            drop = set()
            for i, item in enumerate(items):
                order = sorted(item, key=lambda t: -row[alive.index(t)].item())
                count = int(entered[i] * ratios[layers.index(k)])
                drop |= set(order[count:])
                items[i] = sorted(order[:count])
            stay = [t for t in alive if t not in drop]
            x, alive = x[[alive.index(t) for t in stay]], stay
            pos = torch.arange(len(alive)) if compact else torch.tensor(alive)
        read.append(len(alive))
        x = layer(x, pos)
    return x[-1], read


SAMPLES = [
    [randn(3, 16, seed=1), picture(4, 4, seed=2), randn(4, 16, seed=3)],
    [picture(4, 4, seed=4), randn(2, 16, seed=5), picture(4, 6, seed=6), randn(3, 16, seed=7)],
    [randn(5, 16, seed=8)],
]


@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_equals_the_plain_layers_with_rows_cut_by_hand(positions: str) -> None:
    """A batch of one, two and no pictures."""
    model = ToyVLM(depth=8)
    flows = Interpreter(model, PyramidDrop(), positions=positions).prefill(*SAMPLES)
    for flow, sample in zip(flows, SAMPLES, strict=True):
        last, read = by_hand(model, sample, (2, 4, 6), (0.5, 0.25, 0.125), positions == "compact")
        assert [len(h) for h in flow.hidden[:2]] == read[:2]
        assert [trace.u1.shape[0] for trace in flow.traces.values()] == read
        torch.testing.assert_close(flow.x[-1], last, rtol=1e-10, atol=1e-10)
    uniform, _ = by_hand(model, SAMPLES[0], (2, 4, 6), (0.5, 0.5, 0.5), positions == "compact")
    assert not torch.allclose(flows[0].x[-1], uniform)


def test_counts_per_stage_and_their_average() -> None:
    (flow,) = Interpreter(ToyVLM(depth=8), PyramidDrop()).prefill([picture(8, 8), randn(2, 16)])
    read = [trace.u1.shape[0] - 2 for trace in flow.traces.values()]
    assert read == [64, 64, 32, 32, 16, 16, 8, 8]
    assert sum(read) / 8 / 64 == (1 + 0.5 + 0.25 + 0.125) / 4
    assert [cache.k.shape[1] - 2 for cache in flow.caches.values()] == read


def test_ratio_1_is_the_plain_model_bit_for_bit() -> None:
    model = ToyVLM(depth=8)
    (flow,) = Interpreter(model, PyramidDrop(ratios=("100%",) * 3)).prefill(SAMPLES[0])
    x, read = by_hand(model, SAMPLES[0], (), (), False)
    assert read == [23] * 8
    assert torch.equal(flow.x[-1], x)


def test_ratios_refer_to_what_enters_the_lm() -> None:
    """After a connector method that keeps 32 of 64, the cuts keep 16, 8 and 4."""
    (flow,) = Interpreter(ToyVLM(depth=8), FirstHalf(), PyramidDrop()).prefill([picture(8, 8), randn(2, 16)])
    assert [trace.u1.shape[0] - 2 for trace in flow.traces.values()] == [32, 32, 16, 16, 8, 8, 4, 4]
