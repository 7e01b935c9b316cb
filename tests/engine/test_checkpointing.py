"""Gradient checkpointing under a plan: the backward pass runs layers again on what was kept, and chooses nothing."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import zoo
from cases import CASES, pairs
from probes import Call, Pick, Probed, Tapped, Watched, forward, generate
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import batch_by_hand, checkpointed, gradients, labelled, learning

import winnow
from winnow.contract import Method, ModelInfo, Reduction, View
from winnow.engine.request import request_now
from winnow.models.llava import Llava

FORMS = pytest.mark.parametrize("reentrant", [False, True])


def calls(model: nn.Module) -> list[int]:
    """The layers of the language model in the order in which their MLPs run."""
    seen: list[int] = []
    for index, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, index=index: seen.append(index))
    return seen


def learn(model: nn.Module, plan: Any, *batches: dict[str, torch.Tensor]) -> tuple[list[float], dict[str, Any]]:
    """The loss of each batch, and the gradients after all of them."""
    losses = []
    with winnow.compress(model, plan):
        for inputs in batches:
            loss = model(**inputs, labels=labelled(inputs)).loss
            loss.backward()
            losses.append(loss.item())
    return losses, gradients(model)


def same(a: tuple[list[float], dict[str, Any]], b: tuple[list[float], dict[str, Any]]) -> bool:
    """Losses and gradients, bit for bit."""
    return a[0] == b[0] and a[1].keys() == b[1].keys() and all(torch.equal(a[1][k], b[1][k]) for k in a[1])


@FORMS
@pytest.mark.parametrize(("kind", "build"), pairs())
def test_losses_and_gradients_are_bit_identical_with_and_without(kind, build, reentrant):
    inputs = zoo.inputs(build, zoo.MIXED)
    model = checkpointed(zoo.model(build), reentrant)
    ran = calls(model)
    plan = Watched(CASES[kind].plan)
    found = learn(model, plan, inputs)
    chosen = list(plan.items)
    assert ran == [*range(zoo.DEPTH), *reversed(range(zoo.DEPTH))], "the backward pass ran no layer again"
    plan.items.clear()
    assert same(found, learn(zoo.model(build).train(), plan, inputs))
    assert chosen == plan.items, "a step ran again in the backward pass"


@FORMS
@pytest.mark.parametrize("kind", ["picked", "merged", "tapped", "probed"])
def test_layers_that_are_served_from_the_whole_sequence(kind, reentrant, monkeypatch):
    """As those with sliding windows are: the first one is given its shortened input before its checkpoint too."""
    monkeypatch.setattr(Llava, "short", False)
    inputs, model = zoo.inputs("llava_clip", zoo.MIXED), checkpointed(zoo.model("llava_clip"), reentrant)
    ran = calls(model)
    found = learn(model, CASES[kind].plan, inputs)
    assert len(ran) == 2 * zoo.DEPTH
    assert same(found, learn(zoo.model("llava_clip").train(), CASES[kind].plan, inputs))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["picked", "merged", "tapped", "probed"])
def test_gradients_equal_by_hand(kind, build, checkpointing):
    parts, (plan, by_hand) = zoo.samples(build, zoo.RAGGED), CASES[kind]
    model = checkpointed(zoo.model(build)) if checkpointing else zoo.model(build).train()
    losses, found = learn(model, plan, zoo.collate(parts))
    plain = zoo.model(build)
    loss = torch.stack(batch_by_hand(learning(plain), parts, by_hand)).mean()
    loss.backward()
    expected = gradients(plain)
    assert abs(losses[0] - loss) <= 1e-5
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name


@FORMS
@pytest.mark.parametrize("build", zoo.BUILDS)
@pytest.mark.parametrize("at", ["projected", "layers[2]"])
def test_without_a_mask(at, build, reentrant):
    """Nothing but positions says then which rows belong together, and those of what is kept have gaps."""
    inputs = zoo.inputs(build, zoo.SINGLE)
    labels = labelled(inputs)
    del inputs["attention_mask"]
    found = []
    for model in (zoo.model(build).train(), checkpointed(zoo.model(build), reentrant)):
        with winnow.compress(model, Pick(keep=5, at=at)):
            loss = model(**inputs, labels=labels, use_cache=True).loss
            loss.backward()
        found.append(([loss.item()], gradients(model)))
    assert abs(found[0][0][0] - found[1][0][0]) <= 1e-6  # another kernel where there is a mask
    assert all((found[1][1][k] - g).abs().max() <= 1e-5 for k, g in found[0][1].items())


@FORMS
@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_micro_batches_add_up(build, reentrant):
    batches = [zoo.inputs(build, rows) for rows in (zoo.RAGGED, zoo.SINGLE, zoo.MIXED)]
    found = learn(checkpointed(zoo.model(build), reentrant), Probed(), *batches)
    assert same(found, learn(zoo.model(build).train(), Probed(), *batches))


@FORMS
def test_two_forwards_under_two_plans_before_one_backward(reentrant):
    first, second = zoo.inputs("llava_clip", zoo.RAGGED), zoo.inputs("llava_clip", zoo.SINGLE, seed=1)

    def both(model):
        with winnow.compress(model, Probed()) as handle:
            loss = model(**first, labels=labelled(first)).loss
            with handle.using(Tapped(keep=3)):
                loss = loss + model(**second, labels=labelled(second)).loss
            with handle.using("full"):
                loss = loss + model(**second, labels=labelled(second)).loss
            loss.backward()
        return [loss.item()], gradients(model)

    assert same(both(checkpointed(zoo.model("llava_clip"), reentrant)), both(zoo.model("llava_clip").train()))


def _in_a_thread(model, handle, loss):
    thread = threading.Thread(target=loss.backward)  # as backward passes on an accelerator do
    thread.start()
    thread.join()


def _detached(model, handle, loss):
    handle.detach()
    loss.backward()


def _under_another_plan(model, handle, loss):
    handle.detach()
    with winnow.compress(model, Tapped(keep=2)):
        loss.backward()


def _in_the_full_plan(model, handle, loss):
    with handle.using("full"):
        loss.backward()


@FORMS
@pytest.mark.parametrize("how", [_in_a_thread, _detached, _under_another_plan, _in_the_full_plan])
def test_the_backward_pass_depends_on_nothing_attached(how, reentrant):
    inputs = zoo.inputs("llava_clip", zoo.RAGGED)
    model = checkpointed(zoo.model("llava_clip"), reentrant)
    handle = winnow.compress(model, Tapped())
    loss = model(**inputs, labels=labelled(inputs)).loss
    how(model, handle, loss)
    handle.detach()
    assert same(([loss.item()], gradients(model)), learn(zoo.model("llava_clip").train(), Tapped(), inputs))


@FORMS
def test_a_backward_pass_inside_another_forward(reentrant):
    """Somebody's hook trains while a request runs: layers that run again there are none of that request's."""
    inputs, other = zoo.inputs("llava_clip", zoo.RAGGED), zoo.inputs("llava_clip", zoo.RAGGED, seed=5)
    model = checkpointed(zoo.model("llava_clip"), reentrant)
    with winnow.compress(model, Tapped()) as handle:
        alone = forward(model.eval(), other).logits
        kept = [item.kept.tolist() for item in handle.last.items]
        loss = model.train()(**inputs, labels=labelled(inputs)).loss

        def backward(module, args, output):
            hook.remove()
            loss.backward()

        hook = model.model.language_model.layers[1].mlp.register_forward_hook(backward)
        assert torch.equal(forward(model.eval(), other).logits, alone)
        assert [item.kept.tolist() for item in handle.last.items] == kept
        expected = learn(zoo.model("llava_clip").train(), Tapped(), inputs)
    assert same(([loss.item()], gradients(model)), expected)


@FORMS
def test_a_request_is_freed_before_the_backward_pass(reentrant):
    """What is saved for it are tensors of what was kept."""
    inputs, seen = zoo.inputs("llava_clip", zoo.RAGGED), []
    watch = Call(lambda view: seen.append(weakref.ref(request_now.get().lm)), at="layers[2]")
    model = checkpointed(zoo.model("llava_clip"), reentrant)
    with winnow.compress(model, winnow.Plan((Probed(), watch))):
        loss = model(**inputs, labels=labelled(inputs)).loss
        gc.collect()
        assert seen
        assert not any(ref() for ref in seen)
        loss.backward()


@dataclass(frozen=True)
class Blend(Method):
    """Learned queries mix the tokens of a layer into four rows."""

    at: str = "layers[2]"  # type: ignore[misc]
    slug: ClassVar[str] = "blend-of-the-tests"
    identity: ClassVar[None] = None

    def build(self, info: ModelInfo) -> nn.Module:
        torch.manual_seed(7)
        return nn.Linear(info.width, 4, bias=False)

    def reduce(self, view: View) -> Reduction:
        weights = view.module(view.tokens).transpose(1, 2).softmax(-1)
        return Reduction.mix(weights, representative=torch.arange(4).expand(view.b, -1))


@FORMS
def test_learned_steps_between_layers_get_their_gradient(reentrant):
    inputs, found = zoo.inputs("llava_clip", zoo.RAGGED), []
    for model in (zoo.model("llava_clip").train(), checkpointed(zoo.model("llava_clip"), reentrant)):
        with winnow.compress(model, Blend()) as handle:
            handle.train()
            loss = model(**inputs, labels=labelled(inputs)).loss
            loss.backward()
            (weight,) = handle.parameters()
        found.append(([loss.item()], {**gradients(model), "blend": weight.grad}))
    assert found[0][1]["blend"].abs().max() > 0
    assert same(*found)


@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_every_second_layer(build):
    inputs, model = zoo.inputs(build, zoo.RAGGED), zoo.model(build).train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(every_n_layers=2)
    ran = calls(model)
    found = learn(model, Probed(), inputs)
    assert zoo.DEPTH < len(ran) < 2 * zoo.DEPTH
    assert same(found, learn(zoo.model(build).train(), Probed(), inputs))


@FORMS
def test_the_model_keeps_nothing(reentrant):
    inputs, model = zoo.inputs("llava_clip", zoo.RAGGED), checkpointed(zoo.model("llava_clip"), reentrant)
    layers = model.model.language_model.layers
    before, copies = [dict(vars(layer)) for layer in layers], []

    def copied(view):
        if not copies:
            copies.extend([*copy.deepcopy(layers), *pickle.loads(pickle.dumps(layers))])

    with winnow.compress(model, Call(copied, at="layers[2]")):
        model(**inputs, labels=labelled(inputs)).loss.backward()
        assert {type(layer._gradient_checkpointing_func) for layer in copies} == {partial}
        assert [layer._gradient_checkpointing_func for layer in layers] == [
            was["_gradient_checkpointing_func"] for was in before
        ]
        layers[3].mlp.act_fn = None
        with pytest.raises(TypeError):
            model(**inputs)
    assert all(vars(layer).keys() == was.keys() for layer, was in zip(layers, before, strict=True))
    assert [layer._gradient_checkpointing_func for layer in layers] == [
        was["_gradient_checkpointing_func"] for was in before
    ]


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_generating_in_training_mode_is_refused_and_in_eval_mode_is_not(build):
    inputs, model = zoo.inputs(build, zoo.RAGGED), checkpointed(zoo.model(build))
    with winnow.compress(zoo.model(build), Probed()) as handle:
        expected = generate(handle.model, inputs).sequences
    with winnow.compress(model, Probed()):
        with pytest.raises(winnow.UnsupportedError, match=r"gradient checkpointing.*model\.eval\(\)"):
            generate(model, inputs)
        model.eval()
        assert torch.equal(generate(model, inputs).sequences, expected)


def test_layers_that_are_checkpointed_in_another_way_are_refused():
    """A model's own code may call a checkpoint on `layer.__call__`, whose hooks would run again."""

    class Layer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.self_attn = inner, inner.self_attn

        def forward(self, hidden_states, past_key_values=None, **kwargs):
            return checkpoint(self.inner.forward, hidden_states, use_reentrant=False, **kwargs)

    inputs, model = zoo.inputs("llava_clip", zoo.SINGLE), checkpointed(zoo.model("llava_clip"))
    lm = model.model.language_model
    lm.layers = nn.ModuleList(Layer(layer) for layer in lm.layers)
    with winnow.compress(model, Pick(at="layers[2]")), pytest.raises(winnow.UnsupportedError, match="not known"):
        model(**inputs)
