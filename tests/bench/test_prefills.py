"""A plan that is attached anew reads what it has encoded before, and nothing that another plan has."""

from __future__ import annotations

import pytest
import torch
import zoo
from probes import forward

import winnow
from winnow.bench.prefills import attached
from winnow.core.errors import WinnowError

BUILD = "llava_clip"


def encoded_under(model, sample, plan):
    with winnow.compress(model, plan), torch.no_grad():
        return model.model.get_image_features(sample["pixel_values"])


@pytest.mark.parametrize("plan", ["fastervlm:keep=5", "visionzip:keep=6", "fastv:layer=2,keep=25%"])
def test_what_was_encoded_before_is_read_as_pixels_are(plan):
    model, sample = zoo.model(BUILD), zoo.samples(BUILD, zoo.SINGLE)[0]
    encoded = encoded_under(model, sample, plan)
    with winnow.compress(model, plan) as handle:
        want, kept = forward(model, sample).logits, handle.last.items[0].kept
    given = {name: x for name, x in sample.items() if name != "pixel_values"}
    given["mm_encoder_outputs"] = {"image": encoded}
    for _ in range(2):
        with attached(model, plan, encoded) as handle:
            assert torch.equal(forward(model, given).logits, want)
            assert torch.equal(handle.last.items[0].kept, kept)
        assert not handle.attached


def test_what_another_plan_has_encoded_is_refused():
    model, sample = zoo.model(BUILD), zoo.samples(BUILD, zoo.SINGLE)[0]
    with torch.no_grad():
        plain = model.model.get_image_features(sample["pixel_values"])
    for encoded in (plain, encoded_under(model, sample, "fastervlm:keep=6")):
        with pytest.raises(WinnowError, match="was not encoded under"), attached(model, "fastervlm:keep=5", encoded):
            pass
        assert not winnow.engine.engine.is_compressed(model)
