"""What the ledger says of work and memory is what torch counts and what the tensors hold."""

from __future__ import annotations

import pytest
import torch
import zoo
from cases import CASES, SOME, pairs
from probes import Pick, Probed, Received, Tapped, forward, generate
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import winnow

FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **kw: sdpa_flop_count(q, k, v)}


def counted(model, inputs) -> int:
    """FLOPs of the language model alone, as torch's counter sees them; attention as the full N²."""
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        forward(model, inputs, logits_to_keep=1)
    names = [name for name in counter.get_flop_counts() if name.endswith(".language_model")]
    assert len(names) == 1
    return sum(counter.get_flop_counts()[names[0]].values())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [zoo.SINGLE, ("3 A 6", "3 A 6")], ids=["one", "two"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_flops_of_the_full_model_are_what_torch_counts(build, rows, implementation):
    """Under SDPA torch counts nothing on a CPU; it is told here to count the fused kernel like two products of N²."""
    model, inputs = zoo.model(build), zoo.inputs(build, rows)
    model.set_attn_implementation(implementation)
    plain = counted(model, inputs)
    with winnow.compress(model, Pick(keep=3)) as handle:
        forward(model, inputs)
        assert handle.last.flops_full == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_flops_of_a_compressed_model_are_what_torch_counts(kind, build, implementation):
    """Within 1 %, for what the LM itself computes: the layers, on as many tokens as each of them read.

    What a method computes for its choice is its own cost, not the LM's, and is not in the ledger's FLOPs.
    """
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    model.set_attn_implementation(implementation)
    with winnow.compress(model, CASES[kind].plan) as handle:
        forward(model, inputs)
        ledger = handle.last
    lengths = [layer[0] for layer in ledger.layer_tokens]
    assert ledger.flops == pytest.approx(sum(counted_layer(model, n) for n in lengths), rel=0.01)
    assert ledger.flops < ledger.flops_full


def counted_layer(model, n: int) -> int:
    """FLOPs of one decoder layer on n tokens."""
    lm = model.model.language_model
    hidden = torch.randn(1, n, 64)
    positions = torch.arange(n)[None]
    rope = lm.rotary_emb(hidden, positions if model.config.model_type != "qwen2_5_vl" else positions.expand(3, 1, -1))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        lm.layers[0](hidden, position_embeddings=rope, attention_mask=None)
    return counter.get_total_flops()


@pytest.mark.parametrize(("kind", "build"), pairs(["received", "folded"]))
def test_the_whole_language_model_does_no_more_than_its_layers(kind, build):
    """Counted through the real forward, for methods that have chosen before the LM."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    model.set_attn_implementation("eager")
    with winnow.compress(model, CASES[kind].plan) as handle:
        total = counted(model, inputs)
        assert handle.last.flops == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("rows", [zoo.SINGLE, zoo.RAGGED, zoo.MIXED], ids=["single", "ragged", "mixed"])
@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_kv_bytes_are_the_bytes_of_the_tensors_in_the_cache(kind, build, rows):
    """Of their storages: nothing dropped is still held behind a view."""
    model, inputs = zoo.model(build), zoo.inputs(build, rows)
    plain = forward(model, inputs, use_cache=True).past_key_values
    with winnow.compress(model, CASES[kind].plan) as handle:
        cache = forward(model, inputs, use_cache=True).past_key_values
        ledger = handle.last
    assert ledger.kv_bytes == stored(cache)
    assert ledger.kv_bytes_full == stored(plain)
    assert ledger.kv_bytes < ledger.kv_bytes_full
    for layer, counts in zip(cache.layers, ledger.layer_tokens, strict=True):
        assert layer.keys.shape[2] == max(counts)


def stored(cache) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_through_generate_the_ledger_is_that_of_the_prefill(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Probed()) as handle:
        forward(model, inputs, use_cache=True)
        once = handle.last
        generate(model, inputs)
        told = handle.last
    assert told is not once
    assert (told.flops, told.kv_bytes, told.layer_tokens) == (once.flops, once.kv_bytes, once.layer_tokens)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_bfloat16_cache_holds_half_the_bytes(build):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = zoo.model(build, dtype=dtype), zoo.inputs(build, zoo.SINGLE, dtype=dtype)
        with winnow.compress(model, Pick(keep=3)) as handle:
            cache = forward(model, inputs, use_cache=True).past_key_values
            found[dtype] = handle.last.kv_bytes
            assert handle.last.kv_bytes == stored(cache)
    assert found[torch.float32] == 2 * found[torch.bfloat16]


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_times_are_told_only_when_asked_for(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Tapped()) as handle:
        generate(model, inputs)
        assert handle.last.times == {}
        handle.timing = True
        generate(model, inputs)
        times = handle.last.times
        assert {"encoder", "select", "prefill"} <= set(times)
        assert all(0 <= value < 60_000 for value in times.values())
        handle.timing = False
        generate(model, inputs)
        assert handle.last.times == {}


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_nan_scores_are_counted_and_never_kept(build):
    """One broken pixel makes NaN of its picture; the method says how many scores were broken, and keeps its budget."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, Received(keep=5)) as handle:
        forward(model, inputs)
        assert handle.last.nan_scores == 0
        broken = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        broken["pixel_values"].view(-1)[3] = torch.nan
        forward(model, broken)
        assert handle.last.nan_scores > 0
        assert len(handle.last.items[0].kept) == 5
