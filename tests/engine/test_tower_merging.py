"""ToMe on real towers, beside what every method is held to: its settings, what feeds an output, and what follows it."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from cases import check_against_hand, effect
from methods.byhand.tome import merging
from probes import Pick, Received, forward
from towerhand import in_tower, tiles_of

import winnow
from winnow.core.plan import Plan
from winnow.methods.tome import ToMe


@pytest.mark.parametrize(("r", "proportional"), [(1, True), (3, False)], ids=["by-size", "plain"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_equals_by_hand(build, r, proportional):
    method = ToMe(r, proportional)
    assert effect(zoo.model(build), zoo.inputs(build, zoo.SINGLE), method) > 1e-2
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), method, in_tower(merging(r, proportional)))


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_sizes_are_the_patches_that_feed_each_output(build):
    model, part = zoo.model(build), zoo.sample(build, "3 C 6")
    with winnow.compress(model, ToMe(2)) as handle:
        forward(model, part)
        (item,) = handle.last.items
    (tiles,) = tiles_of(Reference(model), part, merging(2))
    stands = [pair for tile in tiles for pair in list(zip(tile.ids, tile.groups, strict=True))[tile.prefix :]]
    sizes = sorted(len(group) for _, group in stands)
    whole = item.provenance()
    assert sorted((whole.to_matrix() != 0).sum(1).tolist()) == sizes
    assert sum(sizes) == item.n_visual
    assert whole.is_stochastic


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_methods_of_the_connector_and_of_the_decoder_follow(build):
    """Merged in the tower, chosen behind the projector by attention of the tower, and chosen again in the LM."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with winnow.compress(model, Plan((ToMe(1), Received(keep=6), Pick(keep=2, at="layers[2]")))) as handle:
        forward(model, inputs)
        ledger = handle.last
    for item in ledger.items:
        assert len(item.kept) == 2
        assert [point for point, _, _ in item.reductions][-2:] == ["projected", "layers[2]"]
        whole = item.provenance()
        assert (whole.n, whole.m) == (item.n_visual, 2)
        assert torch.equal(whole.representatives, item.kept)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_without_pairs_nothing_changes(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    plain = forward(model, inputs).logits
    with winnow.compress(model, ToMe(0)):
        assert torch.equal(forward(model, inputs).logits, plain)
