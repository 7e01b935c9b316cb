"""A compressed model computes what each sample gives when it is worked by hand: alone, unpadded, layer by layer."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from cases import CASES, check_against_hand, effect, pairs
from probes import forward

import winnow

LIMIT = {"folded": 1e-6, "merged": 1e-6}  # the weights of a merge are fp32 in every dtype


@pytest.mark.parametrize(("kind", "build"), pairs())
def test_a_ragged_batch_equals_by_hand(kind, build):
    """Three rows, three sizes of pictures and text, left-padded: logits of six steps, kept tokens, layer lengths."""
    case, model, parts = CASES[kind], zoo.model(build), zoo.samples(build, zoo.RAGGED)
    check_against_hand(model, parts, case.plan, case.by_hand)
    assert effect(model, zoo.collate(parts), case.plan) > 1e-2


@pytest.mark.parametrize(("kind", "build"), pairs())
def test_one_sample_equals_by_hand(kind, build):
    """Batch 1 has no mask at all."""
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.SINGLE), *CASES[kind])


@pytest.mark.parametrize(("kind", "build"), pairs())
def test_pictures_here_and_there_equal_by_hand(kind, build):
    """One picture, none, and two with text between them, in one batch."""
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), *CASES[kind])


@pytest.mark.parametrize(("kind", "build"), pairs())
def test_in_float64_the_forward_equals_by_hand_tightly(kind, build):
    """Last logits of each sample alone: no padding moves a position, so that no cosine is rounded anew."""
    model, parts = zoo.model(build, dtype=torch.float64), zoo.samples(build, zoo.RAGGED, dtype=torch.float64)
    case, reference = CASES[kind], Reference(model)
    for part in parts:
        with winnow.compress(model, case.plan):
            logits = forward(model, part).logits[0, -1]
        worked = case.by_hand(reference, part, reference.entry(part))
        trace = reference.run(worked.entry, (), worked.cuts)
        assert (logits - trace.logits[0]).abs().max() <= LIMIT.get(kind, 1e-12)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "build"), pairs())
def test_in_float64_a_ragged_batch_equals_by_hand(kind, build):
    """`generate` gives its logits in fp32, which sets the limit; the choice of tokens is exact."""
    parts = zoo.samples(build, zoo.RAGGED, dtype=torch.float64)
    model = zoo.model(build, dtype=torch.float64)
    check_against_hand(model, parts, *CASES[kind], tolerance=LIMIT.get(kind, 5e-7))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(("kind", "build"), pairs())
def test_other_weights_and_pictures_equal_by_hand(kind, build, seed):
    parts = zoo.samples(build, (*zoo.RAGGED, *zoo.MIXED), seed=10 * seed)
    check_against_hand(zoo.model(build, seed=seed), parts, *CASES[kind])


@pytest.mark.full
@pytest.mark.parametrize(("kind", "build"), pairs())
def test_a_deeper_model_equals_by_hand(kind, build):
    check_against_hand(zoo.model(build, layers=8), zoo.samples(build, zoo.RAGGED), *CASES[kind])
