"""Encoder outputs that many plans share give what the pixels give, on every family."""

from __future__ import annotations

import pytest
import torch

from tests import zoo
from winnow.bench.baselines import Chosen, Downsample, Uniform, choosing
from winnow.bench.requests import without_pixels
from winnow.bench.reuse import Encoded, listening
from winnow.core.budget import Budget
from winnow.core.errors import UnsupportedError
from winnow.core.plan import FULL, Plan
from winnow.engine.compress import compress

PLANS = ("full", "fastervlm:keep=5", "visionzip:keep=5", "vtc-cls:keep=5", "hiprune:keep=5", "divprune:keep=5",
         "todre:keep=5", "fastv:keep=5", "pyramiddrop", Plan((Uniform(Budget(5)),)), Plan((Downsample(Budget(5)),)),
         Plan((Chosen("ceiling", Budget(5)),)))  # fmt: skip
ROWS = ("3 A 6", "4 A 5")  # two pictures of one size, as a batch holds them


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_one_encoding_serves_every_plan(build):
    model, inputs = zoo.model(build), zoo.inputs(build, ROWS)
    options = {"max_new_tokens": 3, "do_sample": False}
    with compress(model, FULL) as handle, torch.no_grad():
        plans = []
        for spec in PLANS:
            try:
                handle.bind(Plan.of(spec))
                plans.append(Plan.of(spec))
            except UnsupportedError:
                continue
        assert len(plans) >= 8
        encoded = Encoded(handle, listening(handle, plans), inputs)
        own = [(layout, (0, 2, 3)) for layout in encoded.layouts]
        said = set()
        for plan in plans:
            with handle.using(plan), choosing(own):
                wanted = model.generate(**inputs, **options)
                kept = [item.kept.tolist() for item in handle.last.items]
                shared = {"mm_encoder_outputs": {"image": encoded.under(plan)}}
                found = model.generate(**without_pixels(inputs), **shared, **options)
                assert [item.kept.tolist() for item in handle.last.items] == kept
            assert torch.equal(found, wanted)
            said.add(tuple(wanted.flatten().tolist()))
        assert len(said) > len(plans) // 2, "plans must differ, or any would pass for any other"
