"""TransPrune (arXiv 2507.20630) in the engine: a signal of its own, summed over layers in State.token, and cuts."""

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
from torch.nn.functional import cosine_similarity

import winnow
from winnow.contract import (
    Action,
    Budget,
    LMAttention,
    LMSignal,
    Method,
    Observe,
    Point,
    Reduce,
    Reduction,
    Site,
    State,
    Step,
    View,
)
from winnow.core.plan import Plan


@dataclass(frozen=True)
class Transition(LMSignal):
    """How much a layer that has run changed each token, `[b, N]`: norm ratio × softmax of the turn, of both modules."""

    def site(self, info):
        return Site("lm", self.layer, "hidden")

    def read(self, seen):
        return transition(*seen.attention, seen.mask) + transition(*seen.mlp, seen.mask)


def transition(u: Tensor, o: Tensor, real: Tensor) -> Tensor:
    """`[…, n, D]` before and after a module to `[…, n]`, over the whole sequence; what is not `real` is padding."""
    turn = (1 - cosine_similarity(u, o, dim=-1)).masked_fill(~real, -torch.inf)
    return o.norm(dim=-1) / u.norm(dim=-1) * turn.softmax(-1)


@dataclass(frozen=True)
class TransPrune(Method):
    """Keep the tokens that layers transform most and that the instruction looks at."""

    accumulate: tuple[int, ...] = (1, 2, 3)
    prune: tuple[int, ...] = (2, 3)
    ratios: tuple[Budget, ...] = (Budget("60%"), Budget("30%"))
    attention: bool = True

    slug = "transprune"
    rounding = "floor"

    def steps(self, info):
        steps = []
        for n in sorted({*self.accumulate, *self.prune}):  # layer n − 1 has run before layers[n]
            needs = (Transition(n - 1),) if n in self.accumulate else ()
            if n in self.prune and self.attention:
                needs += (LMAttention(n, rows="question"),)
            steps.append(Step(Point("layers", n), partial(self.act, n), needs))
        return tuple(steps)

    def act(self, n: int, view: View, state: State) -> tuple[Action, State]:
        total = state.token.get("ttv", torch.zeros_like(view.ids, dtype=view.tokens.dtype))
        if n in self.accumulate:
            total = total + view[Transition(n - 1)]
        state = replace(state, token=state.token | {"ttv": total})
        if n not in self.prune:
            return Observe(), state
        score = total / total.sum(-1, keepdim=True)
        if self.attention:
            looked = view[LMAttention(n, rows="question")]
            score = score + looked / looked.sum(-1, keepdim=True)
        count = min(view.n, self.ratios[self.prune.index(n)].of(view))
        return Reduce(Reduction.select(score.topk(count).indices.sort(-1).values, view.n)), state


@dataclass(frozen=True)
class EveryThird(Method):
    """Drop every third token before a layer: a method that knows nothing of the running sums."""

    layer: int = 2

    slug = "every-third"
    identity = None

    def steps(self, info):
        return (Step(Point("layers", self.layer), self.drop),)

    @staticmethod
    def drop(view: View, state: State) -> Reduction:
        kept = torch.arange(view.n)[torch.arange(view.n) % 3 != 2]
        return Reduction.select(kept.expand(view.b, -1), view.n)


def turned(reference: Reference, layer: int, seen: Seen, entry: Entry) -> Tensor:
    """`[n]` the transition of an LM layer, from its parts called one by one."""
    block = reference.lm.layers[layer]
    rope = reference.lm.rotary_emb(seen.hidden, entry.positions[..., seen.held])
    u1 = block.input_layernorm(seen.hidden)
    out, _ = block.self_attn(hidden_states=u1, attention_mask=None, position_embeddings=rope)
    u2 = block.post_attention_layernorm(seen.hidden + out)
    every = torch.ones(1, len(seen.held), dtype=torch.bool)
    return (transition(u1, out, every) + transition(u2, block.mlp(u2), every))[0]


def by_hand(method: TransPrune, foreign: int | None, reference: Reference, sample: dict, entry: Entry) -> Hand:
    """Sums by logical position, in a dictionary."""
    sums: dict[int, float] = {}

    def third(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        return rows[torch.arange(len(rows)) % 3 != 2]

    @torch.no_grad()
    def at(n: int, seen: Sequence[Seen]) -> Seen:
        if n in method.accumulate:
            for position, value in zip(
                seen[n - 1].held.tolist(), turned(reference, n - 1, seen[n - 1], entry), strict=True
            ):
                sums[position] = sums.get(position, 0.0) + float(value)
        if n == foreign:
            seen = [*seen[:-1], cut(entry, third)(seen)]
        if n not in method.prune or not entry.items:
            return seen[-1]
        now = seen[-1]
        weights = reference.lm_attention(n, now, entry).mean(0)
        looked = weights[now.held > entry.items[-1][-1]].mean(0)

        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            own = torch.tensor([sums[position] for position in now.held[rows].tolist()])
            score = own / own.sum() + (looked[rows] / looked[rows].sum() if method.attention else 0)
            share = float(method.ratios[method.prune.index(n)].value[:-1]) / 100
            return rows[top(score, min(len(rows), int(len(entry.content[number]) * share)))]

        return cut(entry, choose)(seen)

    return Hand(entry, {n: partial(at, n) for n in range(1, 4)})


@pytest.mark.parametrize("rows", [zoo.RAGGED, zoo.MIXED], ids=["ragged", "mixed"])
@pytest.mark.parametrize("foreign", [None, 2, 3])
@pytest.mark.parametrize("build", ["llava_next", "qwen2_5_vl"])
def test_sums_follow_their_tokens_through_every_reduction(build, foreign, rows):
    """Through its own cuts, and through those of another method between them or at the same point before it."""
    method = TransPrune()
    others = () if foreign is None else (EveryThird(foreign),)
    plan = Plan((*others, method))
    check_against_hand(zoo.model(build), zoo.samples(build, rows), plan, partial(by_hand, method, foreign))


@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_without_attention_the_sums_alone_decide(build):
    method = TransPrune(attention=False)
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.RAGGED), method, partial(by_hand, method, None))


def test_shares_of_all_are_the_identity():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.MIXED)
    said = generate(model, inputs)
    with winnow.compress(model, TransPrune(ratios=("100%", "100%"))):
        assert same(generate(model, inputs), said)


def test_transition_of_a_scaling_is_uniform_and_padding_takes_no_part():
    generator = torch.Generator().manual_seed(4)
    u, o = torch.randn(2, 12, 8, generator=generator, dtype=torch.float64)
    every = torch.ones(12, dtype=torch.bool)
    torch.testing.assert_close(transition(u, 3 * u, every), torch.full((12,), 3 / 12, dtype=u.dtype))
    order = torch.randperm(12, generator=generator)
    torch.testing.assert_close(transition(u, o, every)[order], transition(u[order], o[order], every))
    real = torch.arange(12) < 9
    torch.testing.assert_close(transition(u, o, real)[:9], transition(u[:9], o[:9], every[:9]))
