"""What holds on the oldest and on the newest transformers: `make test` and `make test-newest` both run this.

transformers 5.24 renamed the keyword of the KV cache. The engine, which looked for the old one, saw no cache: batches
and loops by hand gave other tokens, cuts inside the LM crashed, the ledger counted 0 bytes, static caches were taken.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import zoo
from byhand import Reference
from cases import picking
from probes import Pick, forward, generate, new_tokens, step_logits
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

import winnow
from winnow.engine.versions import CACHE_NAMES, cache_keyword, cache_of

POINTS = ("projected", "layers[2]")


def modules(build):
    model = zoo.model(build)
    base = model.base_model
    layer = base.language_model.layers[0]
    return [model, base, base.language_model, layer, layer.self_attn]


def empty(model):
    return DynamicCache(config=model.config.get_text_config())


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_all_parts_of_a_model_take_the_cache_under_one_keyword(build):
    names = {cache_keyword(part) for part in [*modules(build), create_causal_mask]}
    assert len(names) == 1
    assert names < set(CACHE_NAMES)


def test_the_keyword_is_found_through_a_wrapper_of_the_instance():
    """accelerate replaces `forward` on the instance by a function that takes anything."""
    model = zoo.model("llava_clip")
    expected = cache_keyword(model)
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    assert cache_keyword(model) == expected


def test_bound_methods_are_functions_too():
    layer = zoo.model("llava_clip").base_model.language_model.layers[0]
    assert cache_keyword(layer.forward) == cache_keyword(layer)


def test_a_keyword_that_is_not_known_is_refused():
    class Layer(torch.nn.Module):
        def forward(self, hidden_states, kv_store=None):
            return hidden_states

    with pytest.raises(winnow.UnsupportedError, match=r"Layer\.forward.*cache, past_key_values"):
        cache_keyword(Layer())


def test_the_cache_is_found_under_the_new_and_under_the_old_keyword():
    old, new = object(), object()
    assert cache_of({"past_key_values": old}) is old
    assert cache_of({"cache": new}) is new
    assert cache_of({"cache": new, "past_key_values": old}) is new
    assert cache_of({"cache": None, "past_key_values": old}) is None
    assert cache_of({"input_ids": old}) is None


@pytest.mark.parametrize("old_name", [False, True], ids=["own", "old"])
@pytest.mark.parametrize("part", [0, 1], ids=["model", "base"])
def test_hooks_see_the_cache_whatever_keyword_the_caller_uses(part, old_name):
    """The old keyword still works where it was renamed; a hook runs before the shim that renames it."""
    module, inputs = modules("llava_clip")[part], zoo.inputs("llava_clip", zoo.SINGLE)
    cache = empty(module)
    seen = []
    for inner in module.modules():
        if cache_keyword_or_none(inner):
            inner.register_forward_pre_hook(lambda m, args, kwargs: seen.append(cache_of(kwargs)), with_kwargs=True)
    forward(module, inputs, **{"past_key_values" if old_name else cache_keyword(module): cache})
    assert len(seen) >= 2 + 2 * zoo.DEPTH
    assert all(found is cache for found in seen)


def cache_keyword_or_none(module):
    known = set(CACHE_NAMES) & set(inspect.signature(type(module).forward).parameters)
    return next(iter(known), None)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_cache_of_an_output_is_found(build, recwarn):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    held = cache_of(forward(model, inputs, use_cache=True))
    assert held.get_seq_length() == inputs["input_ids"].shape[1]
    assert cache_of(forward(model, inputs, use_cache=False)) is None
    assert cache_of(generate(model, inputs)).get_seq_length() > inputs["input_ids"].shape[1]
    assert cache_of(ModelOutput()) is None
    assert not [warning for warning in recwarn if "past_key_values" in str(warning.message)]


@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_padded_batch_equals_its_samples(build, at):
    parts = zoo.samples(build, zoo.RAGGED)
    batch, model = zoo.collate(parts), zoo.model(build)
    with winnow.compress(model, Pick(keep=5, at=at)):
        together = generate(model, batch)
        alone = [generate(model, part) for part in parts]
    for row, (one, part) in enumerate(zip(alone, parts, strict=True)):
        assert torch.equal(new_tokens(together, batch)[row], new_tokens(one, part)[0])
        assert (step_logits(together)[row] - step_logits(one)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("named", ["own", "old"])
@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_loop_by_hand_equals_generate(build, at, named):
    """The caller's cache is passed on under the model's own keyword, or under the old one."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    keyword = cache_keyword(model) if named == "own" else "past_key_values"
    with winnow.compress(model, Pick(keep=5, at=at)):
        told = generate(model, inputs)
        output = forward(model, inputs, **{keyword: empty(model)}, use_cache=True)
        for step, token in enumerate(new_tokens(told, inputs)[0]):
            assert (output.logits[0, -1] - step_logits(told)[0, step]).abs().max() <= 1e-5
            output = forward(model, {"input_ids": token[None, None]}, **{keyword: cache_of(output)}, use_cache=True)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_ledger_counts_the_bytes_of_the_cache(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    reference = Reference(model)
    entry = reference.entry(inputs)
    trace = reference.run(entry, cuts={2: picking(entry, 5)})
    with winnow.compress(model, Pick(keep=5, at="layers[2]")) as handle:
        forward(model, inputs, use_cache=True)
        assert handle.last.kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in trace.cache.layers) > 0
        assert handle.last.kv_bytes < handle.last.kv_bytes_full


@pytest.mark.parametrize("plan", ["fastv:keep=5,layer=2", "pyramiddrop:ratios=[50%,25%],layers=[1,2]"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_methods_that_cut_inside_the_lm_run_on_a_padded_batch(build, plan):
    parts = zoo.samples(build, zoo.RAGGED)
    batch, model = zoo.collate(parts), zoo.model(build)
    with winnow.compress(model, plan):
        together = new_tokens(generate(model, batch), batch)
        alone = [new_tokens(generate(model, part), part) for part in parts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("given", ["named", "made"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_static_cache_is_refused(build, given):
    from transformers import StaticCache

    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    made = StaticCache(config=model.config.get_text_config(), max_cache_len=256)
    options = {"cache_implementation": "static"} if given == "named" else {cache_keyword(model): made}
    with winnow.compress(model, Pick(keep=3)), pytest.raises(winnow.UnsupportedError, match="static"):
        generate(model, inputs, **options)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_model_whose_layers_take_the_cache_otherwise_is_refused_when_it_is_compressed(build, monkeypatch):
    """The next rename is refused, not taken for a model without a cache."""
    model = zoo.model(build)
    layer = type(model.base_model.language_model.layers[0])

    def forward(self, hidden_states, attention_mask=None, position_ids=None, kv_store=None, **kwargs):
        raise AssertionError("the model must not run")

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(winnow.UnsupportedError, match="cache"):
        winnow.compress(model, Pick(keep=3))
