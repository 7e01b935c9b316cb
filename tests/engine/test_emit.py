"""`Emit`: new tokens that are no linear map of the old take the places of their representatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from byhand import Entry, Hand, Reference, Seen
from cases import check_against_hand, effect
from probes import forward
from torch import Tensor

import winnow
from winnow.contract import Emit, Layout, Method, ModelInfo, Reduction, State, Step, View
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.testing import run_step

ROWS = ("3 A 6", "1 B 2 A 5", "9")


@dataclass(frozen=True)
class Squashed(Method):
    """Each block of four tokens as one: the hyperbolic tangent of its sum, in the place of its second token."""

    at: str = "projected"  # type: ignore[misc]
    wrong: str = ""
    slug: ClassVar[str] = "squashed-of-the-tests"
    identity: ClassVar[None] = None

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point.of(self.at), self.squash),)

    def squash(self, view: View, state: State) -> tuple[Emit, State]:
        blocks = view.n // 4
        matrix = torch.eye(blocks).repeat_interleave(4, 1)
        matrix = torch.cat([matrix, torch.zeros(blocks, view.n % 4)], 1).expand(view.b, -1, -1)
        came = Reduction.mix(matrix / 4, representative=(4 * torch.arange(blocks) + 1).expand(view.b, -1))
        tokens = (matrix @ view.tokens).tanh()
        match self.wrong:
            case "short":
                return Emit(tokens[:, 1:], came), state
            case "layout":
                return Emit(tokens, came, Layout.grid(1, blocks)), state
            case "nowhere":
                return Emit(tokens), state
        return Emit(tokens, came), state


def squashing(entry: Entry):
    def apply(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for content in entry.content:
            rows = torch.isin(now.held, content).nonzero()[:, 0].tolist()
            for row in rows:
                stay[row] = False
            for first in range(0, len(rows) - 3, 4):
                hidden[0, rows[first + 1]] = now.hidden[0, rows[first : first + 4]].sum(0).tanh()
                stay[rows[first + 1]] = True
        return Seen(hidden[:, stay], now.held[stay])

    return apply


@pytest.mark.parametrize("build", zoo.BUILDS)
@pytest.mark.parametrize("layer", [0, 2])
def test_equals_by_hand(build: str, layer: int) -> None:
    plan = Plan((Squashed(at=f"layers[{layer}]" if layer else "projected"),))

    def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry) -> Hand:
        return Hand(entry, {layer: squashing(entry)})

    check_against_hand(zoo.model(build), zoo.samples(build, ROWS), plan, by_hand)
    assert effect(zoo.model(build), zoo.inputs(build, ROWS), plan) > 1e-3


def test_is_no_linear_map_and_leaves_the_model_as_it_was() -> None:
    """What the provenance alone would make of the tokens is something else."""
    model, inputs = zoo.model("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", ROWS)
    plain = forward(model, inputs).logits
    with winnow.compress(model, Squashed()) as handle:
        emitted = forward(model, inputs).logits
        item = handle.last.items[0]
        composed = item.provenance()
        assert (composed.n, composed.m) == (item.n_visual, item.n_visual // 4)
        assert torch.equal(item.kept, torch.arange(1, item.n_visual, 4)[: composed.m])
        assert composed.sources(1).tolist() == [4, 5, 6, 7]
    assert not torch.allclose(emitted, plain, atol=1e-3)
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wrong": "short"}, "emitted tokens of shape"),
        ({"wrong": "layout"}, "layout of their own"),
        ({"wrong": "nowhere"}, "layout of their own"),
        ({"at": "features"}, r"at projected and layers"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(settings: dict[str, str], message: str) -> None:
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ROWS)
    with winnow.compress(model, Squashed(**settings)), pytest.raises(winnow.WinnowError, match=message):
        forward(model, inputs)


def test_runs_on_plain_tensors() -> None:
    tokens = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    made = run_step(Squashed(), tokens=tokens)
    assert [ids.tolist() for ids in made.kept] == [[1, 5], [1, 5]]
    torch.testing.assert_close(made.rows[1][1], tokens[1, 4:8].sum(0).tanh())
    with pytest.raises(winnow.WinnowError, match="Emit with a provenance"):
        run_step(Squashed(wrong="nowhere"), tokens=tokens)
