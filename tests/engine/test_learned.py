"""What `build` makes: on the model's device and in its dtype, saved and loaded, and trained when the caller trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from probes import forward
from torch import nn

import winnow
from winnow.contract import Budget, Method, ModelInfo, Reduction, State, Step, View
from winnow.core.point import Point


@dataclass(frozen=True)
class Mixer(Method):
    """Learned queries read the tokens: M rows, each a softmax mixture."""

    rows: int = 4
    slug: ClassVar[str] = "mixer-of-the-tests"
    identity: ClassVar[None] = None

    def build(self, info: ModelInfo) -> nn.Module:
        torch.manual_seed(7)
        return nn.Linear(info.width, self.rows, bias=False)

    def reduce(self, view: View) -> Reduction:
        weights = view.module(view.tokens).transpose(1, 2).softmax(-1)
        representative = torch.arange(self.rows).expand(view.b, -1)
        return Reduction.mix(weights, representative=representative)


def test_what_is_built_has_the_models_dtype_and_no_gradient_by_default():
    model = zoo.model("llava_clip", dtype=torch.bfloat16)
    inputs = zoo.inputs("llava_clip", zoo.RAGGED, dtype=torch.bfloat16)
    with winnow.compress(model, Mixer()) as handle:
        assert {p.dtype for p in handle.parameters()} == {torch.bfloat16}
        model(**inputs).logits.float().sum().backward()
        assert all(p.grad is None for p in handle.parameters())
        assert [len(item.kept) for item in handle.last.items] == [4, 4, 4]


def test_gradients_flow_through_a_step_when_the_caller_trains():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    with winnow.compress(model, Mixer()) as handle:
        handle.train()
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        (grad,) = [p.grad for p in handle.parameters()]
        assert grad is not None
        assert grad.abs().sum() > 0
        # The gradient is right: a small step against it lowers the loss by what it promises.
        (weight,) = handle.parameters()
        rate = 1e-3 / grad.norm()
        with torch.no_grad():
            weight -= rate * grad
        lower = model(**inputs, labels=labels).loss
        promised = float(rate * grad.pow(2).sum())
        assert float(loss - lower) == pytest.approx(promised, rel=0.05)


def test_what_was_built_is_saved_and_loaded(tmp_path):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ("3 A 6",))
    with winnow.compress(model, Mixer()) as handle:
        before = forward(model, inputs).logits
        handle.save(tmp_path)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.zero_()
        assert not torch.equal(forward(model, inputs).logits, before)
        handle.load(tmp_path)
        assert torch.equal(forward(model, inputs).logits, before)
        assert sorted(handle.state_dict()) == ["0:mixer-of-the-tests.weight"]
        with pytest.raises(winnow.WinnowError, match="do not fit"):
            handle.load_state_dict({"0:mixer-of-the-tests.weight": torch.zeros(2, 2)})
    with winnow.compress(model, Mixer(rows=3)) as other, pytest.raises(winnow.WinnowError, match="this model is"):
        other.load(tmp_path)
    with winnow.compress(model, Mixer()) as handle, pytest.raises(winnow.WinnowError, match=r"winnow\.json"):
        handle.load(tmp_path / "nowhere")


SIX = Budget(6)
SEEN: list[tuple[torch.Tensor, State]] = []


@dataclass(frozen=True)
class Sorter(Method):
    """Drops tokens of the tower and remembers, at `features`, what its step in the LM reads."""

    keep: Budget = SIX
    slug: ClassVar[str] = "sorter-of-the-tests"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return Step(Point("features"), self.remember), Step(Point("layers", 2), self.recall)

    def remember(self, view: View, state: State) -> tuple[Reduction, State]:
        kept = torch.arange(1, view.n, 2).expand(view.b, -1)  # patches 0, 2, 4, …: [CLS] is token 0
        rank = torch.arange(view.n, dtype=torch.float32).flip(0).expand(view.b, -1)
        return Reduction.select(kept, view.n), State(token={"rank": rank}, summed={"size": torch.ones(view.b, view.n)})

    def recall(self, view: View, state: State) -> Reduction:
        SEEN.append((view.ids, state))
        lowest = state.token["rank"].argsort(1)[:, : self.keep.of(view)].sort(1).values
        return Reduction.select(lowest, view.n)


def test_state_from_features_reaches_the_steps_at_layers():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    SEEN.clear()
    with winnow.compress(model, Sorter()) as handle:
        forward(model, inputs)
        items = handle.last.items
    ids, state = SEEN[0]
    patches = torch.arange(0, 25, 2)
    assert torch.equal(ids, patches.expand(3, -1))
    # Rank was n − 1 − token, and token = patch + 1: it came along with the patches that were kept.
    assert torch.equal(state.token["rank"], (24 - patches).float().expand(3, -1))
    assert torch.equal(state.summed["size"], torch.ones(3, 13))
    assert all(item.kept.tolist() == patches[-6:].tolist() for item in items)


def test_inputs_are_prepared_with_what_was_trained(tmp_path):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    with winnow.compress(model, Mixer()) as handle:
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.normal_()
        expected = forward(model, inputs).logits[:, -1]
        handle.save(tmp_path)
    made = forward(model, winnow.prepare(model, inputs, Mixer(), weights=tmp_path).forward_inputs).logits[:, -1]
    fresh = forward(model, winnow.prepare(model, inputs, Mixer()).forward_inputs).logits[:, -1]
    assert (made - expected).abs().max() <= 1e-5
    assert (fresh - expected).abs().max() > 1e-3
