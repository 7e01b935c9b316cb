"""A compressed model computes what each sample gives when it is worked by hand: alone, unpadded, layer by layer."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from cases import SUBSETS, check_against_hand, effect, pairs, proofs
from probes import forward

import winnow

LIMIT = {"visionzip": 1e-6}  # the weights of a merge are fp32 in every dtype


@pytest.mark.parametrize(("slug", "build"), proofs())
def test_a_ragged_batch_equals_by_hand(slug, build):
    """Three rows, three sizes of pictures and text, left-padded: logits of six steps, kept tokens, layer lengths."""
    plan, by_hand = SUBSETS[slug]
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.RAGGED), plan, by_hand)


@pytest.mark.parametrize(("slug", "build"), pairs())
def test_one_sample_equals_by_hand(slug, build):
    """Batch 1 has no mask at all."""
    plan, by_hand = SUBSETS[slug]
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.SINGLE), plan, by_hand)


@pytest.mark.parametrize(("slug", "build"), pairs())
def test_pictures_here_and_there_equal_by_hand(slug, build):
    """One picture, none, and two with text between them, in one batch."""
    plan, by_hand = SUBSETS[slug]
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), plan, by_hand)


@pytest.mark.parametrize(("slug", "build"), pairs())
def test_the_plans_of_these_tests_do_something(slug, build):
    assert effect(zoo.model(build), zoo.inputs(build, zoo.RAGGED), SUBSETS[slug][0]) > 1e-2


@pytest.mark.parametrize(("slug", "build"), pairs())
def test_in_float64_the_forward_equals_by_hand_tightly(slug, build):
    """Last logits of each sample alone: no padding moves a position, so that no cosine is rounded anew."""
    model, parts = zoo.model(build, dtype=torch.float64), zoo.samples(build, zoo.RAGGED, dtype=torch.float64)
    plan, by_hand = SUBSETS[slug]
    reference = Reference(model)
    for part in parts:
        with winnow.compress(model, plan):
            logits = forward(model, part).logits[0, -1]
        worked = by_hand(reference, part, reference.entry(part))
        trace = reference.run(worked.entry, (), worked.cuts)
        assert (logits - trace.logits[0]).abs().max() <= LIMIT.get(slug, 1e-12)


@pytest.mark.parametrize(("slug", "build"), pairs())
def test_in_float64_a_ragged_batch_equals_by_hand(slug, build):
    """`generate` gives its logits in fp32, which sets the limit; the choice of tokens is exact."""
    plan, by_hand = SUBSETS[slug]
    parts = zoo.samples(build, zoo.RAGGED, dtype=torch.float64)
    check_against_hand(zoo.model(build, dtype=torch.float64), parts, plan, by_hand, tolerance=LIMIT.get(slug, 5e-7))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(("slug", "build"), pairs())
def test_other_weights_and_pictures_equal_by_hand(slug, build, seed):
    plan, by_hand = SUBSETS[slug]
    parts = zoo.samples(build, (*zoo.RAGGED, *zoo.MIXED), seed=10 * seed)
    check_against_hand(zoo.model(build, seed=seed), parts, plan, by_hand)


@pytest.mark.full
@pytest.mark.parametrize(("slug", "build"), pairs())
def test_a_deeper_model_equals_by_hand(slug, build):
    plan, by_hand = SUBSETS[slug]
    if slug == "todre":
        plan, by_hand = "todre:keep=9,tau=0.4", SUBSETS["todre"][1].func
        by_hand = _with(by_hand, keep=9, tau=0.4)
    check_against_hand(zoo.model(build, layers=8), zoo.samples(build, zoo.RAGGED), plan, by_hand)


def _with(function, **settings):
    return lambda reference, sample, entry: function(reference, sample, entry, **settings)
