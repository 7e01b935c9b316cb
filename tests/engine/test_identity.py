"""A plan that keeps everything changes no bit, although its methods and the reduction really run."""

from __future__ import annotations

import pytest
import torch
import zoo
from cases import TOWERS, identities, same
from probes import Look, Pick, Watched, forward, generate

import winnow
from winnow.core.plan import Plan

BATCHES = {"ragged": zoo.RAGGED, "single": zoo.SINGLE, "mixed": zoo.MIXED}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_is_bit_identical(build, rows):
    """Forward logits, generated ids and step logits; every item passed through the method and none lost a token."""
    model, inputs = zoo.model(build), zoo.inputs(build, rows)
    plain, said = forward(model, inputs).logits, generate(model, inputs)
    pictures = sum(word.isalpha() for row in rows for word in row.split())
    for inner in identities(build):
        watched = Watched(inner)
        with winnow.compress(model, watched) as handle:
            assert torch.equal(forward(model, inputs).logits, plain), inner
            calls = sum(watched.items)
            assert same(generate(model, inputs), said), inner
            ledger, steps = handle.last, len(inner.checked_steps(handle.info))
        assert calls == pictures * steps
        assert sum(watched.items) == 2 * calls
        assert [len(item.kept) for item in ledger.items] == [item.layout.n_content for item in ledger.items]
        assert all(len(item.reductions) == steps for item in ledger.items)
        assert ledger.flops == ledger.flops_full
        assert ledger.kv_bytes == ledger.kv_bytes_full


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_is_bit_identical_under_right_padding(build):
    """A forward over right-padded rows, as in training: all positions, padding included."""
    model = zoo.model(build)
    inputs = zoo.collate(zoo.samples(build, zoo.RAGGED), side="right", extra=2)
    plain = forward(model, inputs).logits
    for plan in identities(build):
        with winnow.compress(model, plan):
            assert torch.equal(forward(model, inputs).logits, plain), plan


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_is_bit_identical_under_padding_that_all_rows_share(build):
    """Nothing is dropped, so nothing is narrowed, not even padding that no row needs."""
    model = zoo.model(build)
    inputs = zoo.collate(zoo.samples(build, zoo.MIXED), extra=3)
    plain, said = forward(model, inputs).logits, generate(model, inputs)
    for plan in identities(build):
        with winnow.compress(model, plan):
            assert torch.equal(forward(model, inputs).logits, plain), plan
            assert same(generate(model, inputs), said), plan


@pytest.mark.parametrize("point", ["projected", "layers[0]", "layers[1]", "layers[3]"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_selection_of_all_is_bit_identical_at_every_point(build, point):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    said = generate(model, inputs)
    with winnow.compress(model, Pick(keep="100%", at=point)):
        assert same(generate(model, inputs), said)


@pytest.mark.parametrize("build", TOWERS)
def test_looking_at_features_is_bit_identical(build):
    """A step at `features` that keeps everything leaves the projector's own rows."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    said, look = generate(model, inputs), Look(at="features")
    with winnow.compress(model, look):
        assert same(generate(model, inputs), said)
    assert sum(view.b for view in look.views) == 3


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_is_bit_identical_without_cache_and_without_mask(build):
    """The paths of one unpadded sample on which transformers makes no mask at all."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    plain, said = forward(model, bare, use_cache=False).logits, generate(model, inputs, use_cache=False)
    for plan in identities(build):
        with winnow.compress(model, plan):
            assert torch.equal(forward(model, bare, use_cache=False).logits, plain), plan
            assert same(generate(model, inputs, use_cache=False), said), plan


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_of_everything_at_once_is_bit_identical(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    said = generate(model, inputs)
    with winnow.compress(model, Plan(identities(build))):
        assert same(generate(model, inputs), said)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_is_bit_identical_in_other_dtypes(build, dtype):
    model, inputs = zoo.model(build, dtype=dtype), zoo.inputs(build, zoo.RAGGED, dtype=dtype)
    said = generate(model, inputs)
    for plan in identities(build):
        with winnow.compress(model, plan):
            assert same(generate(model, inputs), said), plan


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_is_bit_identical_under_eager_attention(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    model.set_attn_implementation("eager")
    said = generate(model, inputs)
    for plan in identities(build):
        with winnow.compress(model, plan):
            assert same(generate(model, inputs), said), plan
