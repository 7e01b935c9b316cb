"""Trained weights: found for the model that they were trained on, and refused for any other."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import nn

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.models.fingerprint import fingerprint
from winnow.parts.learned import SHIPPED, UNTRAINED, facts_of, in_fp32, learned, untrained


def make(width=3):
    return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width))


def info(word):
    return ModelInfo("a model", fingerprint=lambda: word)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "toy.safetensors"
    module = untrained(partial(make, 5), seed=3)
    save_file({name: x.bfloat16() for name, x in module.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps({"method": "toy", "model": "abc", "sizes": {"width": 5}}))
    return path


def test_weights_are_loaded_with_their_own_sizes(file):
    module = learned("toy", str(file), info("abc"), make)
    assert module[0].weight.shape == (5, 4)
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, untrained(partial(make, 5), seed=3)[0].weight.bfloat16().float())


def test_weights_of_another_model_are_refused(file):
    with pytest.raises(
        WinnowError, match=r"trained for another model.*train with `winnow train toy --model …` and pass"
    ):
        learned("toy", str(file), info("xyz"), make)


def test_a_model_without_shipped_weights_is_told_to_train():
    for slug in ("toy", *(path.stem for path in SHIPPED.glob("*.safetensors"))):
        with pytest.raises(WinnowError, match=f"winnow ships were trained for another.*winnow train {slug} --model"):
            learned(slug, None, info("xyz"), make)


def test_on_plain_tensors_weights_are_random_ones_from_their_seed():
    alone = torch.random.get_rng_state()
    first, second = learned("toy", None, ModelInfo(), make), learned("toy", UNTRAINED, info("xyz"), make)
    assert torch.equal(alone, torch.random.get_rng_state())
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[0].weight.std() > 0
    assert (first[0].bias == 0).all()
    assert (first[1].weight == 1).all()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.with_suffix(".json").unlink(), "no readable JSON"),
        (lambda path: path.with_suffix(".json").write_text("{"), "no readable JSON"),
        (lambda path: path.write_bytes(b"nothing"), "do not fit"),
        (lambda path: path.unlink(), "do not fit"),
        (lambda path: save_file({"0.weight": torch.zeros(1)}, path), "do not fit"),
        (
            lambda path: path.with_suffix(".json").write_text(
                '{"method": "toy", "model": "abc", "sizes": {"depth": 1}}'
            ),
            "do not fit",
        ),
    ],
    ids=["no facts", "bad facts", "bad file", "no file", "other weights", "other sizes"],
)
def test_files_that_cannot_be_used_are_told(file, spoil, told):
    spoil(file)
    with pytest.raises(WinnowError, match=told):
        learned("toy", str(file), info("abc"), make)


def test_half_precision_computes_in_fp32():
    module = untrained(make)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    narrow = untrained(make).bfloat16()
    rounded = untrained(make)
    rounded.load_state_dict({name: p.float() for name, p in narrow.state_dict().items()})
    assert torch.equal(in_fp32(module, x), module(x.float()))
    assert torch.equal(in_fp32(narrow, x), rounded(x.float()))
    assert narrow[0].weight.dtype == torch.bfloat16


def test_a_fingerprint_tells_weights_and_not_dtypes():
    model = zoo.model("llava_clip", dtype=torch.bfloat16)
    words = {dtype: fingerprint(model.to(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    assert len(set(words.values())) == 1
    other = zoo.model("llava_clip", dtype=torch.bfloat16, seed=1)
    assert fingerprint(other) not in words.values()
    with torch.no_grad():
        model.model.language_model.norm.weight[0] += 1
    assert fingerprint(model) not in words.values()


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_weights_are_small_and_say_how_they_were_made(path):
    facts = facts_of(path, path.stem)
    assert path.stat().st_size <= 1_000_000
    assert facts["command"].startswith(f"winnow train {path.stem}")
    asked = "records" if facts["model"] in ("detector", "writer") else "questions"  # toys that are asked nothing
    assert {"seed", "data", "measured", asked, "held_out"} <= set(facts)
