"""Weights of 8 and 4 bits: a plan keeps what the quantised model does, and what cannot run is refused."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import zoo
from transformers import TorchAoConfig

import winnow
from winnow import reference
from winnow.core.errors import WinnowError
from winnow.engine.doctor import diagnose
from winnow.models import quantized
from winnow.models.load import load


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed: pip install {package}")


KINDS = [
    pytest.param("8bit", marks=needs("bitsandbytes")),
    pytest.param("4bit", marks=needs("bitsandbytes")),
    pytest.param("torchao", marks=needs("torchao")),
]


def wanted(kind):
    if kind != "torchao":
        return kind
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def first_projection(model):
    return model.model.language_model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_compressed_as_any_other(kind):
    """Keeping all changes no bit, a subset is that subset by hand, and the rest of what the doctor checks."""
    model, processor = load(reference.path(), device="cpu", quantization=wanted(kind), dtype="bfloat16")
    weight = first_projection(model).weight
    assert "Tensor" != type(weight).__name__ != "Parameter", "the weights are not quantised"
    found = diagnose(model, processor)
    assert [f"{check.name}: {check.detail}" for check in found if not check.ok] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_may_be_loaded_with_it(kind):
    model, _ = winnow.load(device="cpu", quantization=wanted(kind), plan="hiprune:keep=9")
    assert winnow.handle_of(model).plan == winnow.plan("hiprune:keep=9")
    assert not model.training


def test_shapes_that_do_not_run_here_are_refused_when_they_are_loaded(monkeypatch):
    model = zoo.model("llava_clip")
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: 1 / 0)
    with pytest.raises(WinnowError, match="another quantization") as caught:
        quantized.check_runs(model, "the checkpoint")
    assert caught.value.__context__ is None


@pytest.mark.parametrize("asked", ["2bit", "8", "", 8, True, {"load_in_8bit": True}])
def test_a_quantization_that_is_none_is_refused(asked):
    with pytest.raises(WinnowError, match="8bit, 4bit"):
        load(device="cpu", quantization=asked)


def test_a_quantised_checkpoint_is_not_quantised_again():
    with pytest.raises(WinnowError, match="quantised already"):
        quantized.quantized("X", {"quantization_config": {"quant_method": "awq"}}, "8bit", "auto")


def test_without_bitsandbytes_its_extra_is_named(monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    with pytest.raises(WinnowError, match=r"tokenwinnow\[quantization\]"):
        load(device="cpu", quantization="4bit")


@pytest.mark.parametrize(
    ("said", "precision", "computed"),
    [("bfloat16", "auto", torch.bfloat16), ("bfloat16", torch.float16, torch.float16), (None, "auto", torch.float32)],
)
@needs("bitsandbytes")
def test_4bit_computes_in_the_models_own_dtype(said, precision, computed):
    assert quantized.quantized("X", {"dtype": said}, "4bit", precision).bnb_4bit_compute_dtype == computed
