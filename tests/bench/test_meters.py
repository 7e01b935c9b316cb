"""Meters against counts made in another way."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from tests import zoo
from winnow.bench.intervals import efficiency, median, paired, rate
from winnow.bench.meters import costs, counted_flops, evidence_recall, judge, read_by_layer
from winnow.core.layout import Layout
from winnow.engine.compress import compress
from winnow.engine.flops import lm_flops

PLANS = ("full", "fastervlm:keep=6", "visionzip:keep=6", "fastv:layer=2,keep=6", "pyramiddrop", "todre:keep=6")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("plan", ["full", "fastervlm:keep=6", "visionzip:keep=6", "fastv:layer=2,keep=6"])
@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_analytic_flops_are_those_that_torch_counts(build, plan, attention):
    if build == "qwen2_5_vl" and plan.startswith("visionzip"):
        plan = "hiprune:keep=6"  # its tower has no step at `features`
    counted, said, full = _flops(build, plan, attention)
    assert counted == pytest.approx(said, rel=0.01)
    assert (said == full) == (plan == "full")


def test_what_a_method_computes_between_the_layers_is_counted_beside_the_prefill():
    counted, said, _ = _flops("llava_clip", "divprune:keep=6", "sdpa")
    v, width = 25, 64
    strips = sum(5 * (v - start) for start in range(0, v, 5))  # of DivPrune's table, from the diagonal on
    assert counted - said == 2 * strips * width


def _flops(build, plan, attention):
    model = zoo.model(build)
    model.set_attn_implementation(attention)
    with torch.no_grad(), compress(model, plan) as handle:
        inputs = zoo.inputs(build, zoo.SINGLE)
        counted = counted_flops(lambda: model(**inputs, logits_to_keep=1), "model.language_model")
        return counted, handle.last.flops, handle.last.flops_full


def test_flops_count_attention_in_full_and_are_known_for_a_model_that_can_be_counted_by_hand():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=9
    )
    n, d, f = 10, 8, 16
    linear = 2 * n * d * d * 2 + 2 * n * d * (d // 2) * 2 + 3 * 2 * n * d * f
    attention = 2 * 2 * n * n * d
    assert lm_flops(config, [[n]]) == linear + attention
    assert lm_flops(config, [[n, n], [n, n]], head_tokens=1) == 4 * (linear + attention) + 2 * d * 9


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("rows", [zoo.SINGLE, ("3 A 6", "3 B 6")])
def test_kv_bytes_are_the_bytes_of_the_storages_that_are_held(plan, rows):
    model = zoo.model("llava_clip")
    with torch.no_grad(), compress(model, plan) as handle:
        cache = model(**zoo.inputs("llava_clip", rows), use_cache=True).past_key_values
        ledger = handle.last
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for layer in cache.layers
            for x in (layer.keys, layer.values)}  # fmt: skip
    config = model.config.get_text_config()
    own = costs(ledger, config, model.dtype.itemsize)
    assert sum(held.values()) == ledger.kv_bytes
    assert sum(c.kv_bytes for c in own) == ledger.kv_bytes
    assert sum(c.kv_bytes_full for c in own) == ledger.kv_bytes_full
    assert sum(c.flops for c in own) == ledger.flops
    assert all(c.layer_tokens <= max(ledger.logical) for c in own)


@pytest.mark.parametrize("plan", PLANS)
def test_what_each_layer_reads_of_an_item_adds_up_to_the_tokens_that_it_reads(plan):
    build = "llava_clip"
    model = zoo.model(build)
    with torch.no_grad(), compress(model, plan) as handle:
        model(**zoo.inputs(build, zoo.SINGLE))
        ledger, item = handle.last, handle.last.items[0]
        read = read_by_layer(item, len(ledger.layer_tokens))
    text = ledger.logical[0] - item.layout.n
    assert [len(ids) + text for ids in read] == [layer[0] for layer in ledger.layer_tokens]
    assert [i for i in read[-1].tolist() if i >= 0] == [
        i for i, r in zip(item.kept.tolist(), read[-1], strict=True) if r >= 0
    ]
    assert all(set(later.tolist()) <= set(earlier.tolist()) for earlier, later in itertools.pairwise(read))


def test_evidence_recall_is_the_mean_over_layers_of_the_share_that_is_read():
    layout = Layout.grid(4, 4)
    corner = ((0.0, 0.0, 0.5, 0.5),)  # ids 0, 1, 4, 5
    everything = np.arange(16)
    assert evidence_recall([everything] * 3, layout, corner) == 1.0
    assert evidence_recall([everything, np.array([0, 1, 15]), np.array([-1, 3])], layout, corner) == pytest.approx(0.5)
    assert evidence_recall([everything], layout, ()) is None


@pytest.mark.parametrize(
    ("answer", "truth", "cut", "want"),
    [
        ("Yes.", "yes", False, (True, "ok")),
        ("no", "yes", False, (False, "ok")),
        ("", "yes", False, (False, "empty")),
        (" . ", "yes", False, (False, "empty")),
        ("None", "yes", False, (False, "none")),
        ("none", "None", False, (True, "ok")),
        ("I'm sorry, I cannot see it", "yes", False, (False, "refusal")),
        ("yes", "yes", True, (False, "long")),
        ("yes yes", "yes", False, (False, "ok")),
    ],
)
def test_e4_odd_answers_are_wrong_and_counted_apart(answer, truth, cut, want):
    assert judge(answer, truth, cut=cut) == want


def test_e6_an_interval_is_shown_for_few_items_and_no_difference_is_said_in_words():
    same = paired([True, False] * 5, [True, False] * 5)
    assert str(same).startswith("no difference (10 items, [")
    assert same.low < 0 < same.high
    assert paired([True] * 8, [True] * 8).low < 0, "without variance the interval must not collapse"
    some = paired([True] * 8, [True] * 7 + [False])
    assert (some.value, some.lost, some.gained, some.n) == (-1 / 8, 1, 0, 8)
    assert str(some) == f"-12.5% [{some.low:+.1%}, {some.high:+.1%}]"
    assert rate(0, 5).high > 0.3
    assert math.isnan(rate(0, 0).value)
    assert paired([], []).n == 0


def test_the_paired_interval_is_newcombes():
    # Newcombe 1998, Stat. Med. 17, 2635, example (a): 36 both, 12 first only, 2 second only, 0 neither; method 10.
    first = [True] * 36 + [True] * 12 + [False] * 2
    second = [True] * 36 + [False] * 12 + [True] * 2
    found = paired(second, first)
    assert (round(found.value, 4), round(found.low, 4), round(found.high, 4)) == (0.2, 0.0569, 0.3404)


def test_the_paired_interval_covers_the_truth_nineteen_times_in_twenty():
    rng = random.Random(1)
    both, lost, gained = 0.6, 0.15, 0.05
    hits = 0
    for _ in range(2000):
        draws = rng.choices(range(4), (both, lost, gained, 1 - both - lost - gained), k=60)
        found = paired([d in (0, 1) for d in draws], [d in (0, 2) for d in draws])
        hits += found.low <= gained - lost <= found.high
    assert 0.935 <= hits / 2000 <= 0.985


def test_efficiency_pairs_rounds_and_has_an_interval():
    full, native = np.full(20, 100.0), np.full(20, 20.0)
    assert efficiency(full, native, native).value == 1.0
    assert efficiency(full, full, native).value == 0.0
    noisy = native + np.random.default_rng(0).normal(10, 4, 20)
    found = efficiency(full, noisy, native)
    assert found.low < found.value < found.high < 1
    drift = np.linspace(1, 2, 20)  # the machine gets slower; what ran next to each other still compares
    assert efficiency(full * drift, native * drift, native * drift).value == pytest.approx(1)
    assert median([1.0, 1.0, 1.0, 3.0]).spread == pytest.approx(0.5)
