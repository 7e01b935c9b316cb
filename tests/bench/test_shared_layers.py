"""Blocks and layers that plans share: the same bits as without, computed once, and nothing shared that differs."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests import zoo
from winnow.bench import shared_layers
from winnow.bench.requests import without_pixels
from winnow.bench.reuse import Encoded, listening
from winnow.bench.shared_layers import SharedLayers
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.core.registry import method_class
from winnow.core.signal import Site
from winnow.engine.compress import compress

from .conftest import BASELINES

ROWS = ("3 A 6", "4 A 5")
SHARES = ("50%", "30%")
SLUGS = ("fastv", "pyramiddrop", "sparsevlm", "dart", "v2drop", "transprune", "visionzip", "prumerge", "visiondrop",
         "tome", "flowcut", "token-transforming", "fastervlm")  # fmt: skip


def _supported(handle, content) -> dict[str, Plan]:
    """Those of the plans that this model can run, by name."""
    plans = {"full": Plan(())}
    for slug in SLUGS:
        for share in SHARES:
            try:
                plan = Plan.of(method_class(slug).configured().at_budget(Budget(share), content))
                handle.bind(plan)
            except WinnowError:
                continue
            plans[f"{slug} {share}"] = plan
    return plans


def _asked(handle, layers, encoded, plan):
    """What a request gives under sharing: states of the language model, what was kept, and later tokens."""
    bound = handle.bind(plan)
    with handle.using(plan), layers.under(bound):
        given = without_pixels(encoded.inputs) | {"mm_encoder_outputs": {"image": encoded.under(plan)}}
        ids = handle.model.generate(**given, max_new_tokens=3, do_sample=False, output_logits=True,
                                    return_dict_in_generate=True)  # fmt: skip
    maps = [m.to_matrix() for item in handle.last.items for _, _, m in item.reductions]
    return [ids.sequences, *ids.logits, *(item.kept for item in handle.last.items), *maps]


def _runs(build, limit, monkeypatch):
    """What each plan gives, and how often each block and each layer computed its MLP."""
    monkeypatch.setattr(shared_layers, "LIMIT", limit)
    model, inputs = zoo.model(build), zoo.inputs(build, ROWS)
    counts: dict[str, int] = {}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
        for name, module in model.named_modules()
        if name.endswith(".mlp")
    ]
    found = {}
    with compress(model, Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        plans = _supported(handle, zoo.tokens_of(build, "A"))
        with layers.under(handle.bind(reader := listening(handle, list(plans.values())))):
            encoded = Encoded(handle, reader, inputs)
        for name, plan in plans.items():
            counts.clear()
            found[name] = [*_asked(handle, layers, encoded, plan), dict(counts)]
    for hook in hooks:
        hook.remove()
    assert not any("forward" in module.__dict__ for module in model.modules()), "every forward must be put back"
    return found


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_plans_give_the_same_bits_with_shared_layers(build, monkeypatch):
    plain = _runs(build, 0, monkeypatch)
    shared = _runs(build, 2**30, monkeypatch)
    assert plain.keys() == shared.keys()
    assert len(plain) > 10
    for key, (*wanted, _) in plain.items():
        *got, _ = shared[key]
        assert len(got) == len(wanted), key
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b), key
    assert sum(sum(own[-1].values()) for own in shared.values()) < sum(sum(own[-1].values()) for own in plain.values())


def test_a_plan_computes_only_what_its_steps_change(monkeypatch):
    found = _runs("llava_clip", 2**30, monkeypatch)
    plain = _runs("llava_clip", 0, monkeypatch)

    def computed(runs, spec, stack):
        counts = runs[spec][-1]
        return {int(name.split("layers.")[1].split(".")[0]): n for name, n in counts.items() if stack in name and n}

    # Two decoded tokens run every layer; the prompt runs those behind the cut.
    depth = max(computed(found, "full", "language_model")) + 1
    assert computed(found, "full", "language_model") == dict.fromkeys(range(depth), 3)
    assert computed(found, "fastv 30%", "language_model") == {0: 2, 1: 2} | dict.fromkeys(range(2, depth), 3)
    assert computed(plain, "fastv 30%", "language_model") == dict.fromkeys(range(depth), 3)
    assert computed(found, "visionzip 30%", "vision_tower") == {}
    assert computed(found, "tome 30%", "vision_tower") == computed(plain, "tome 30%", "vision_tower") != {}


def test_other_pictures_are_computed():
    model = zoo.model("llava_clip")
    one, other = zoo.inputs("llava_clip", ROWS), zoo.inputs("llava_clip", ROWS, seed=1)
    plan = Plan.of("visionzip:keep=5")
    with compress(model, Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        found = []
        for inputs in (one, other, one):  # nothing is forgotten between them
            with layers.under(handle.bind(reader := listening(handle, [plan]))):
                encoded = Encoded(handle, reader, inputs)
            found.append(_asked(handle, layers, encoded, plan))
            with handle.using(plan):
                assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), found[-1][0])
    assert not torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_outside_of_under_everything_runs():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ROWS)
    with compress(model, Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert not layers._known
        with layers.under(handle.bind(Plan(()))):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert layers._known
        layers.forget()
        assert not layers._known


def test_a_changed_output_is_not_what_the_next_plan_gets():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ROWS)
    with compress(model, Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        wanted = model(**inputs, use_cache=True).logits
        spoil = handle.bound.layers[0].register_forward_hook(lambda module, args, output: output.mul_(0))
        with layers.under(handle.bind(Plan(()))):
            assert not torch.equal(model(**inputs, use_cache=True).logits, wanted)
        spoil.remove()
        with layers.under(handle.bind(Plan(()))):
            assert torch.equal(model(**inputs, use_cache=True).logits, wanted)


@pytest.mark.parametrize("beside", [{}, []])
def test_layers_that_are_given_something_to_write_to_run(beside):
    calls = []

    def layer(hidden, cache=None, **beside):
        calls.append(hidden)
        cache.update(hidden[None], hidden[None], 0)
        return hidden + 1

    with compress(zoo.model("llava_clip"), Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        for times, extra in ((1, {"n": 2}), (2, {"n": 2, "box": beside})):
            layers.forget()
            calls.clear()
            with layers.under(handle.bind(Plan(()))):
                for _ in range(2):
                    given = {"cache": DynamicCache(), **extra}
                    made = layers._run(Site("lm", 0), layer, (torch.ones(1, 4, 8),), given)
                    assert torch.equal(made, torch.full((1, 4, 8), 2.0))
                    assert given["cache"].get_seq_length() == 4
            assert len(calls) == times


def test_a_sweep_is_the_same_with_and_without_shared_layers(sweep, exported, monkeypatch):
    methods = ("fastv", "pyramiddrop", "visionzip", "tome", "flowcut", "sparsevlm")
    shared, _ = sweep("shared.sqlite", methods=methods, baselines=BASELINES, checked=8)
    monkeypatch.setattr(shared_layers, "LIMIT", 0)
    alone, _ = sweep("alone.sqlite", methods=methods, baselines=BASELINES, checked=8)
    assert exported(shared) == exported(alone)
