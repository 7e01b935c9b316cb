"""The plan beside the weights: saved with a compressed model, and found again by `load`."""

from __future__ import annotations

import copy
import json
import pickle
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

import winnow
from winnow.core import registry
from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.reduction import Reduction
from winnow.engine.doctor import REQUESTS, _picture
from winnow.models.inputs import model_inputs
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import preset

PLAN = "hiprune:keep=5 | positions=compact"
SIDE = ("winnow.json", "winnow.safetensors")


@pytest.fixture
def model():
    return make_model(preset("micro"), seed=3).eval()


@pytest.fixture
def processor():
    return make_processor(preset("micro"))


@pytest.fixture
def saved(model, processor, tmp_path):
    """A folder to which a compressed model was saved."""
    with winnow.compress(model, PLAN, processor=processor):
        model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def logits(model, processor):
    size, ask = REQUESTS[0]
    with torch.no_grad():
        return model(**model_inputs(model, processor, _picture(*size), ask)).logits


def test_the_weights_are_plain_and_the_plan_is_beside_them(model, saved, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    assert not (saved / SIDE[1]).exists()
    assert json.loads((saved / SIDE[0]).read_text())["plan"] == winnow.plan(PLAN).key
    model.save_pretrained(plain)
    for name in ("model.safetensors", "config.json"):
        assert (saved / name).read_bytes() == (plain / name).read_bytes()
    assert winnow.handle_of(AutoModelForImageTextToText.from_pretrained(saved)) is None


def test_load_takes_up_the_plan(saved, model, processor):
    with winnow.compress(model, PLAN, processor=processor):
        want = logits(model, processor)
    loaded, own = winnow.load(saved, device="cpu")
    handle = winnow.handle_of(loaded)
    assert handle.plan.key == winnow.plan(PLAN).key
    assert torch.equal(logits(loaded, own), want)
    assert len(handle.last.items[0].kept) == 5
    assert not torch.equal(want, logits(model, processor))


def test_another_plan_or_none_may_be_asked_for(saved, model, processor):
    loaded, own = winnow.load(saved, plan=None, device="cpu")
    assert winnow.handle_of(loaded) is None
    assert torch.equal(logits(loaded, own), logits(model, processor))
    loaded, _ = winnow.load(saved, plan="divprune:keep=3", device="cpu")
    assert winnow.handle_of(loaded).plan == winnow.plan("divprune:keep=3")


def test_the_bundled_model_takes_a_plan():
    model, _ = winnow.load(plan=winnow.HiPrune(keep=9), device="cpu")
    assert winnow.handle_of(model).plan == winnow.plan("hiprune:keep=9")
    assert winnow.handle_of(winnow.load(device="cpu")[0]) is None


@pytest.fixture
def mixer(monkeypatch):
    """A registered method with weights: each of its rows is a mixture of tokens."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(registry, "_extra", dict(registry._extra))

    @winnow.register("mixer-of-the-tests")
    class Mixer(Method):
        rows: int = 4
        identity: ClassVar[None] = None

        def build(self, info):
            torch.manual_seed(7)
            return nn.Linear(info.width, self.rows, bias=False)

        def reduce(self, view):
            representative = torch.arange(self.rows).expand(view.b, -1)
            return Reduction.mix(view.module(view.tokens).transpose(1, 2).softmax(-1), representative=representative)

    return Mixer


def test_what_methods_built_is_saved_too(mixer, model, processor, tmp_path):
    with winnow.compress(model, mixer()) as handle:
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.mul_(-3)
        want = logits(model, processor)
        model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for plan in ({}, {"plan": mixer()}):
        loaded, own = winnow.load(tmp_path, device="cpu", **plan)
        assert torch.equal(logits(loaded, own), want)
    (tmp_path / SIDE[1]).unlink()
    with pytest.raises(WinnowError, match=r"winnow\.safetensors"):
        winnow.load(tmp_path, device="cpu")
    with winnow.compress(model, PLAN):  # saved over it: nothing of the other plan is left
        model.save_pretrained(tmp_path)
    assert winnow.handle_of(winnow.load(tmp_path, device="cpu")[0]).plan == winnow.plan(PLAN)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"plan": 5}'])
def test_a_broken_side_file_is_refused(saved, text):
    (saved / SIDE[0]).write_text(text)
    with pytest.raises(WinnowError, match=r"winnow\.json"):
        winnow.load(saved, device="cpu")
    winnow.load(saved, plan=None, device="cpu")


def test_a_plan_that_cannot_be_read_here_says_how_to_load_without_it(saved):
    (saved / SIDE[0]).write_text('{"plan": "v2|somebodys-method:keep=3"}')
    with pytest.raises(WinnowError, match=r"somebodys-method(.|\n)*plan=None"):
        winnow.load(saved, device="cpu")


def test_detached_the_model_saves_alone_again(model, tmp_path):
    before = vars(model).keys()
    with winnow.compress(model, PLAN):
        assert vars(model).keys() != before or "save_pretrained" in vars(model)
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / SIDE[0]).exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_plain_and_saves_alone(model, copied, tmp_path):
    with winnow.compress(model, PLAN):
        other = copied(model)
        assert winnow.handle_of(other) is None
        other.save_pretrained(tmp_path)
    assert not (tmp_path / SIDE[0]).exists()
    assert (tmp_path / "config.json").exists()


def test_weights_are_not_uploaded_without_their_plan(model, tmp_path):
    with winnow.compress(model, PLAN), pytest.raises(WinnowError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_the_handle_is_found_from_the_model_and_from_its_wrappers(model):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert winnow.handle_of(tuned) is None
    with winnow.compress(tuned, PLAN) as handle:
        assert winnow.handle_of(model) is winnow.handle_of(tuned) is winnow.handle_of(torch.compile(tuned)) is handle
    assert winnow.handle_of(tuned) is None
    assert winnow.handle_of("model") is None


@pytest.fixture
def adapter(model, processor, tmp_path):
    """A base model and, in another folder, an adapter that was saved compressed."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    tuned = get_peft_model(model, config).eval()
    with winnow.compress(tuned, PLAN, processor=processor):
        want = logits(tuned, processor)
        tuned.save_pretrained(folder)
    return folder, want


def test_an_adapter_takes_its_plan_along(adapter, model, processor):
    folder, want = adapter
    assert not (folder / "model.safetensors").exists()
    loaded, own = winnow.load(folder, device="cpu")
    assert type(loaded).__module__.startswith("peft")
    assert winnow.handle_of(loaded).plan == winnow.plan(PLAN)
    assert torch.equal(logits(loaded, own), want)
    with loaded.disable_adapter(), winnow.compress(model, PLAN, processor=processor):
        assert torch.equal(logits(loaded, own), logits(model, processor))
        assert not torch.equal(logits(loaded, own), want)


def test_a_pickled_adapter_is_refused(adapter):
    folder, _ = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for beside in (False, True):
        if beside:
            (folder / "config.json").write_text((folder.parent / "base" / "config.json").read_text())
        with pytest.raises(WinnowError, match="pickled"):
            winnow.load(folder, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": 3}'])
def test_an_adapter_that_does_not_name_its_model_is_refused(adapter, text):
    folder, _ = adapter
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(WinnowError, match=r"adapter_config\.json"):
        winnow.load(folder, device="cpu")
