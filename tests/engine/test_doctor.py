"""The doctor is green on every build, and each of its checks fails when the seam that it guards is broken."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import contextmanager

import builds
import pytest
import torch
import zoo
from transformers.cache_utils import DynamicLayer

import winnow
from winnow.core.errors import UnsupportedError
from winnow.engine import doctor, doctor_checks, forward, whole_call
from winnow.engine.doctor import CHECKS, diagnose, run_checks
from winnow.models import supported_versions

ROWS = ("3 A 6", "3 B 9")
SUBSET = "a subset equals the same subset by hand"


def red(model, *names, build="llava_clip") -> dict[str, str]:
    """Of the checks of these names those that failed, each with what the doctor says."""
    only = tuple(check for check in CHECKS if check[0] in names)
    assert len(only) == len(names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "CHECKS", only)  # the others are not looked at
        return {check.name: check.detail for check in run_checks(model, zoo.samples(build, ROWS)) if not check.ok}


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_all_checks_hold(build):
    checks = run_checks(zoo.model(build), zoo.samples(build, ROWS))
    assert [check.name for check in checks] == [name for name, *_ in CHECKS]
    assert {check.name: check.detail for check in checks if not check.ok} == {}


def test_all_checks_hold_in_half_precision():
    model = zoo.model("llava_next", dtype=torch.bfloat16)
    checks = run_checks(model, zoo.samples("llava_next", ROWS, dtype=torch.bfloat16))
    assert {check.name: check.detail for check in checks if not check.ok} == {}


def test_the_requests_are_a_padded_batch_of_unequal_rows():
    for build in zoo.BUILDS:
        batch = doctor_checks.padded(zoo.samples(build, ROWS))
        lengths = batch["attention_mask"].sum(1).tolist()
        assert lengths[0] != lengths[1]
        assert max(lengths) < batch["input_ids"].shape[1]
        assert batch["attention_mask"][:, -1].all()


def renamed(model):
    """The model as a version of transformers that gives the cache another keyword: what 5.24 did to `past_key_values`.

    Hooks that were there first see the new keyword; the model itself works as before.
    """
    base = model.base_model
    for module in (base, base.language_model, *base.language_model.layers):
        names = [n for n in ("cache", "past_key_values") if n in _parameters(module)]

        def rename(module, args, kwargs, names=names):
            for name in {"cache", "past_key_values"} & kwargs.keys():
                kwargs["kv_store"] = kwargs.pop(name)
            return args, kwargs

        def forward(*args, plain=module.forward, name=names[0], **kwargs):
            if "kv_store" in kwargs:
                kwargs[name] = kwargs.pop("kv_store")
            return plain(*args, **kwargs)

        module.register_forward_pre_hook(rename, with_kwargs=True)
        module.forward = functools.wraps(module.forward)(forward)
    return model


def _parameters(module):
    import inspect

    return inspect.signature(type(module).forward).parameters


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_cache_under_an_unknown_keyword_is_found(build):
    """As transformers 5.24.0, which gave other tokens in silence while the doctor of that day was green."""
    names = (
        "decoding by hand equals generate",
        "a padded batch equals its samples",
        "a padded batch equals its samples, cut inside the LM",
    )
    found = red(renamed(zoo.model(build)), *names, build=build)
    for name in names:
        assert "keyword of the KV cache" in found[name]


@contextmanager
def while_compressed(monkeypatch, breaks):
    """`breaks(model)` whenever the doctor has compressed it; what it returns is called before the model is detached."""
    plain = doctor_checks.compress

    @contextmanager
    def compress(model, plan):
        with plain(model, plan) as handle:
            mend = breaks(model)
            try:
                yield handle
            finally:
                mend()

    monkeypatch.setattr(doctor_checks, "compress", compress)
    yield


def noise(module):
    """Something on the way changes what the module gives."""
    return module.register_forward_hook(lambda m, args, output: output + 1e-2 * torch.sin(torch.arange(64.0))).remove


def stretched(model):
    """Positions are not what they should be."""
    rotary = model.base_model.language_model.rotary_emb

    def stretch(module, args, kwargs):
        positions = kwargs.pop("position_ids", args[-1] if len(args) > 1 else None)
        return args[:1], {**kwargs, "position_ids": 2 * positions}

    return rotary.register_forward_pre_hook(stretch, with_kwargs=True).remove


def deaf(model):
    """Attention modules no longer go through the function that their configuration names."""
    modules = [layer.self_attn for layer in model.base_model.language_model.layers]
    tapped = [module.config for module in modules]
    for module in modules:
        module.config = model.config.get_text_config()

    def mend():
        for module, config in zip(modules, tapped, strict=True):
            module.config = config

    return mend


BROKEN = {
    "keep all is the identity": lambda model: noise(model.base_model.language_model.norm),
    SUBSET: stretched,
    "attention is seen, and left as it was": deaf,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_seam_is_found_and_named(monkeypatch, name):
    suspects = next(suspects for check, _, suspects in CHECKS if check == name)
    with while_compressed(monkeypatch, BROKEN[name]):
        found = red(zoo.model("llava_clip"), name)
    assert found[name].endswith(f"Suspect: {suspects}.")


def test_a_token_too_many_is_found(monkeypatch):
    """The engine does not do what the method asked for."""
    keeps = doctor_checks.Evenly.index
    monkeypatch.setattr(
        doctor_checks.Evenly, "index", lambda self, n: torch.arange(2) if self.share == 0 else keeps(self, n)
    )
    assert "kept [2]" in red(zoo.model("llava_clip"), "one token kept")["one token kept"]


def test_a_static_cache_that_is_taken_and_wrong_is_found(monkeypatch):
    """The class of its layers is not the one that the engine refuses, and the mask is not that of a padded batch."""
    plain = doctor_checks.Subject.answer

    def answer(self, inputs, cache_implementation=None):
        if cache_implementation and winnow.handle_of(self.model):  # taken, and its padding forgotten
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}
        return plain(self, inputs)

    monkeypatch.setattr(doctor_checks.Subject, "answer", answer)
    assert (
        "StaticLayer"
        in red(zoo.model("llava_clip"), "a static cache is refused or right")["a static cache is refused or right"]
    )


def test_a_cache_that_holds_everything_is_found(monkeypatch):
    """Its layers keep what was dropped, so that nothing is saved."""
    plain = DynamicLayer.update

    def update(self, keys, values, *args, **kwargs):
        if not self.get_seq_length():
            keys, values = torch.cat([keys, keys], 2), torch.cat([values, values], 2)
        return plain(self, keys, values, *args, **kwargs)

    with while_compressed(monkeypatch, lambda model: _patched(DynamicLayer, "update", update)):
        assert "DynamicLayer" in red(zoo.model("llava_clip"), "the KV cache holds less")["the KV cache holds less"]


def _patched(owner, name, value):
    plain = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, plain)


def test_what_stays_behind_is_found(monkeypatch):
    def stay(model):
        model.base_model.language_model.norm.weight.data.mul_(1.01)
        return lambda: None

    names = "one token kept", "detaching leaves nothing"  # the first attaches, the second looks
    with while_compressed(monkeypatch, stay):
        assert "logits changed" in red(zoo.model("llava_clip"), *names)["detaching leaves nothing"]


def test_an_untested_version_is_accepted_for_the_class_that_passed(monkeypatch):
    import winnow

    monkeypatch.setattr(supported_versions.transformers, "__version__", "5.99.0")
    monkeypatch.setattr(supported_versions, "_accepted", set())
    model = zoo.model("llava_clip")
    with pytest.raises(winnow.UnsupportedError, match="diagnose"):
        winnow.compress(model, doctor_checks.Evenly())
    checks = run_checks(model, zoo.samples("llava_clip", ROWS))
    assert checks[-1].ok, checks[-1].detail
    assert "5.99.0" in checks[-1].detail
    winnow.compress(model, doctor_checks.Evenly()).detach()
    with pytest.raises(winnow.UnsupportedError, match=r"5\.99\.0"):  # another class has not passed
        winnow.compress(zoo.model("llava_next"), doctor_checks.Evenly())


def test_an_untested_version_that_fails_is_not_accepted(monkeypatch):
    import winnow

    monkeypatch.setattr(supported_versions.transformers, "__version__", "5.99.0")
    monkeypatch.setattr(supported_versions, "_accepted", set())
    model = renamed(zoo.model("llava_clip"))
    checks = run_checks(model, zoo.samples("llava_clip", ROWS))
    assert not checks[-1].ok
    with pytest.raises(winnow.UnsupportedError, match=r"5\.99\.0"):
        winnow.compress(model, doctor_checks.Evenly())


def test_the_processor_of_a_checkpoint_makes_the_requests():
    """Of unequal lengths, with the processor that a checkpoint brings."""
    import winnow

    checks = diagnose(*winnow.load())
    assert {check.name: check.detail for check in checks if not check.ok} == {}


def shifted(monkeypatch):
    """Items are taken to stand one token further on than they do."""
    plain = forward.find_spans

    def find(*args):
        spans, ends = plain(*args)
        return [dataclasses.replace(span, where=span.where + 1) for span in spans], ends

    monkeypatch.setattr(forward, "find_spans", find)


def stale(monkeypatch):
    """Masks are those of the first slots, whoever stands in them."""

    def mask(self, given, past, held, linear):
        width = self.tokens.packing.width
        return None if given is None else given[..., -width:, : held + width]

    monkeypatch.setattr(whole_call.WholeCall, "mask", mask)


@pytest.mark.parametrize("breaks", [shifted, stale])
@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_wrong_span_and_a_stale_mask_are_found_on_whole_called_classes(monkeypatch, name, breaks):
    own = builds.every()[name]
    parts = own.samples(ROWS)
    breaks(monkeypatch)
    monkeypatch.setattr(doctor, "CHECKS", [check for check in CHECKS if check[0] == SUBSET])
    broken = next(
        check for check in run_checks(own.model(), parts, own.collate(parts, extra=1)) if check.name == SUBSET
    )
    assert not broken.ok
    assert "Suspect: what enters the LM (inputs_embeds, position_ids, attention_mask)" in broken.detail


@pytest.mark.parametrize("name", ["gemma3", "internvl", "qwen3_vl"])
def test_a_renamed_attribute_is_named(name):
    own = builds.every()[name]
    model = own.model()
    lm = model.get_decoder()
    lm.blocks = lm.layers
    del lm.layers
    with pytest.raises(UnsupportedError, match=r"layers"):
        run_checks(model, own.samples(ROWS))
