"""TransPrune (arXiv 2507.20630): a signal of its own, summed over layers in State.token, and progressive cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from winnow.core.budget import Budget
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Action, Keep, Reduce, State, Step
from winnow.core.view import View
from winnow.signals.language import LMAttention

from .flow import Trace
from .interpreter import Interpreter
from .layouts import picture
from .sight import Sight, provides
from .toy import ToyVLM, causal, randn


@dataclass(frozen=True)
class Transition(Signal):
    """How much a layer that has run changed each token, `[b, N]`: norm ratio × softmax of the turn, of both modules."""

    layer: int


def transition(u: Tensor, o: Tensor) -> Tensor:
    """`[n, D]` before and after a module, over the whole sequence: `[n]`."""
    return o.norm(dim=-1) / u.norm(dim=-1) * (1 - cosine_similarity(u, o, dim=-1)).softmax(-1)


@provides(Transition)
def _(signal: Transition, sight: Sight) -> Tensor:
    def read(trace: Trace) -> Tensor:
        return transition(trace.u1, trace.attention) + transition(trace.u2, trace.mlp)

    return sight.lm(signal.layer, read)


@dataclass(frozen=True)
class TransPrune(Method):
    """Keep the tokens that layers transform most and that the instruction looks at. Layers are counted from 1."""

    accumulate: tuple[int, ...] = (2, 3, 4, 5, 6)
    prune: tuple[int, ...] = (2, 4, 6)
    ratios: tuple[str, ...] = ("75%", "50%", "25%")
    attention: bool = True

    def steps(self, info):
        steps = []
        for n in sorted({*self.accumulate, *self.prune}):  # layer n has run before layers[n], which counts from 0
            needs: tuple[Signal, ...] = (Transition(n - 1),) if n in self.accumulate else ()
            if n in self.prune and self.attention:
                needs += (LMAttention(n, rows="question"),)
            steps.append(Step(Point("layers", n), partial(self.act, n), needs))
        return tuple(steps)

    def act(self, n: int, view: View, state: State) -> tuple[Action, State]:
        total = state.token.get("ttv", torch.zeros_like(view.ids, dtype=torch.float64))
        if n in self.accumulate:
            total = total + view[Transition(n - 1)]
        state = replace(state, token=state.token | {"ttv": total})
        if n not in self.prune:
            return Keep(), state
        score = total / total.sum(-1, keepdim=True)
        if self.attention:
            looked = view[LMAttention(n, rows="question")]
            score = score + looked / looked.sum(-1, keepdim=True)
        count = Budget(self.ratios[self.prune.index(n)]).of(view, rounding="floor")
        return Reduce(Reduction.select(score.topk(min(count, view.n)).indices.sort(-1).values, view.n)), state


@dataclass(frozen=True)
class EveryThird(Method):
    """Drop every third token before a layer: a method that knows nothing of the running sums."""

    layer: int = 3

    def steps(self, info):
        return (Step(Point("layers", self.layer), self.drop),)

    @staticmethod
    def drop(view: View, state: State) -> tuple[Reduce, State]:
        kept = torch.arange(view.n) % 3 != 2
        return Reduce(Reduction.select(kept.expand(view.b, -1), counts=(int(kept.sum()),) * view.b)), state


TEXT, ITEM, QUESTION = randn(3, 16, seed=1), picture(5, 6, seed=2), randn(4, 16, seed=3)


def by_hand(model: ToyVLM, method: TransPrune, foreign: int | None) -> tuple[Tensor, dict[int, int]]:
    """One sample in a loop, remembering sums by token id in a dictionary: last state, tokens before each prune."""
    x = torch.cat([TEXT, model.projector(model.encode(ITEM.patches[0])[1:]), QUESTION])
    alive, image, sums, counts = list(range(len(x))), list(range(3, 33)), dict.fromkeys(range(len(x)), 0.0), {}

    def cut(stay: list[int]) -> None:
        nonlocal x, alive, image
        left = [t for t in alive if t not in image or t in stay]
        x, alive, image = x[[alive.index(t) for t in left]], left, sorted(stay)

    for k, layer in enumerate(model.layers):
        if k == foreign:
            cut([t for j, t in enumerate(image) if j % 3 != 2])
        if k in method.prune:
            q, key, _ = layer.qkv(layer.norm1(x), torch.tensor(alive))
            rows = layer.weights(q, key, causal(len(x), len(x), x.dtype)).mean(0)[-4:].mean(0)
            looked = {t: rows[alive.index(t)].item() for t in image}
            a, b = sum(sums[t] for t in image), sum(looked.values())
            score = {t: sums[t] / a + (looked[t] / b if method.attention else 0) for t in image}
            counts[k] = len(image)
            share = float(method.ratios[method.prune.index(k)][:-1]) / 100
            cut(sorted(image, key=lambda t: -score[t])[: int(30 * share)])
        u, pos = layer.norm1(x), torch.tensor(alive)
        q, key, v = layer.qkv(u, pos)
        out = layer.join(layer.weights(q, key, causal(len(x), len(x), x.dtype)), v)
        half = x + out
        turned = transition(u, out) + transition(layer.norm2(half), layer.mlp(layer.norm2(half)))
        x = half + layer.mlp(layer.norm2(half))
        if k + 1 in method.accumulate:
            for t in alive:
                sums[t] += turned[alive.index(t)].item()
    return x[-1], counts


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("foreign", [None, 3, 4])
def test_sums_follow_their_tokens_through_every_reduction(attention: bool, foreign: int | None) -> None:
    """Through its own cuts, and through those of another method between them or at the same point before it."""
    model, method = ToyVLM(depth=8), TransPrune(attention=attention)
    others = () if foreign is None else (EveryThird(foreign),)
    (flow,) = Interpreter(model, *others, method).prefill([TEXT, ITEM, QUESTION])
    last, counts = by_hand(model, method, foreign)
    torch.testing.assert_close(flow.x[-1], last, rtol=1e-10, atol=1e-10)
    assert len(flow.lanes[0].ids) == int(30 * 0.25)
    assert counts[2] == 30
    if foreign is not None:  # the test can tell: without the other method the answer is another
        assert not torch.allclose(flow.x[-1], by_hand(model, method, None)[0])


def test_keep_counts_and_identity() -> None:
    model = ToyVLM(depth=8)
    (flow,) = Interpreter(model, TransPrune()).prefill([TEXT, ITEM, QUESTION])
    assert [t.u1.shape[0] - 7 for t in flow.traces.values()] == [30, 30, 22, 22, 15, 15, 7, 7]
    (same,) = Interpreter(model, TransPrune(ratios=("100%",) * 3)).prefill([TEXT, ITEM, QUESTION])
    x = torch.cat([TEXT, model.projector(model.encode(ITEM.patches[0])[1:]), QUESTION])
    for layer in model.layers:
        x = layer(x, torch.arange(len(x)))
    assert torch.equal(same.x, x)


def test_transition_of_a_scaling_is_uniform_and_order_does_not_matter() -> None:
    u, o = randn(12, 8, seed=4), randn(12, 8, seed=5)
    torch.testing.assert_close(transition(u, 3 * u), torch.full((12,), 3 / 12, dtype=u.dtype))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transition(u, o)[order], transition(u[order], o[order]))
