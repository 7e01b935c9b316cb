"""Pictures that the caller encodes: before the forward, and once for several questions."""

from __future__ import annotations

import pytest
import torch
import zoo
from cases import same
from probes import Folded, Pick, forward, generate

import winnow


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_encoding_beforehand_is_the_same_as_encoding_inside(build):
    """`generate` encodes pictures before the forward; so may the caller, under the plan."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    pictures = {k: inputs[k] for k in ("pixel_values", "image_sizes", "image_grid_thw") if k in inputs}
    rest = {k: v for k, v in inputs.items() if k not in pictures or k == "image_grid_thw"}
    with winnow.compress(model, Pick(keep=5)):
        inside = forward(model, inputs).logits
        with torch.no_grad():
            encoded = model.model.get_image_features(**pictures, return_dict=True)
        outside = forward(model, {**rest, "mm_encoder_outputs": {"image": encoded}}).logits
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("plan", [Pick(keep=5), Folded()], ids=["projected", "features"])
@pytest.mark.parametrize("build", zoo.WITH_CLS)
def test_a_picture_that_is_encoded_once_serves_two_questions(build, plan):
    """Nothing of the first request is left on the encoder's outputs; under another plan they are refused."""
    model, part = zoo.model(build), zoo.sample(build, "3 A 6")
    pictures = {k: part[k] for k in ("pixel_values", "image_sizes") if k in part}
    other = zoo.sample(build, "3 A 9")["input_ids"]
    with winnow.compress(model, plan) as handle:
        with torch.no_grad():
            encoded = model.model.get_image_features(**pictures, return_dict=True)
        for ids in (part["input_ids"], other, part["input_ids"]):
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            expected = generate(model, {**text, **pictures})
            assert same(generate(model, {**text, "mm_encoder_outputs": {"image": encoded}}), expected)
        with handle.using(Pick(keep=6)), pytest.raises(winnow.WinnowError, match="another plan"):
            forward(model, {**text, "mm_encoder_outputs": {"image": encoded}})
    with (
        winnow.compress(model, Pick(keep=6)),
        pytest.raises(winnow.WinnowError, match=r"another plan|before the model"),
    ):
        forward(model, {**text, "mm_encoder_outputs": {"image": encoded}})
