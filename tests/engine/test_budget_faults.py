"""Rows B1–B10 of the list of bad budgets and settings, through `compress`; B5 (KV budgets) has no tenant yet."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import zoo
from cases import same
from probes import Pick, Probed, Received, Tapped, forward, generate
from snapshot import differences, snapshot
from transformers import LogitsProcessor, LogitsProcessorList

import winnow
from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.view import View


@pytest.mark.parametrize("keep", [0, -1, -0.1, 1.0, 1.5, math.nan, math.inf, "abc", "", "150%", "-5", True, [8]])
def test_B1_a_budget_out_of_range_is_refused_with_the_range(keep):
    model = zoo.model("llava_clip")
    before = snapshot(model)
    with pytest.raises(winnow.WinnowError, match=r"keep=.*allowed: an int ≥ 1"):
        winnow.compress(model, keep=keep)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("text", ["0", "-3", "-0.1", "1.0", "1.5", "nan", "inf", "abc", "none", "true", "150%"])
def test_B1_in_a_plan_string_too(text):
    with pytest.raises(winnow.WinnowError, match=r"keep=.*allowed"):
        winnow.compress(zoo.model("llava_clip"), f"divprune:keep={text}")


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_B1_zero_is_allowed_where_it_is_meant(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Pick(keep=Budget(0, allow_empty=True))) as handle:
        forward(model, inputs)
        assert [item.kept.tolist() for item in handle.last.items] == [[], [], []]


def test_B1_whether_nothing_may_be_kept_is_part_of_a_plan():
    """Two budgets that differ in it are two plans: 1 % of 25 tokens is one token, or none."""
    one, none = Budget("1%"), Budget("1%", allow_empty=True)
    assert Plan((Pick(keep=one),)).key != Plan((Pick(keep=none),)).key
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.SINGLE)
    with winnow.compress(model, Pick(keep=one)) as handle:
        forward(model, inputs)
        assert len(handle.last.items[0].kept) == 1
        with handle.using(Pick(keep=none)):
            forward(model, inputs)
            assert len(handle.last.items[0].kept) == 0


@pytest.mark.parametrize("probe", [Pick, Received, Tapped])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_B2_more_than_there_is_keeps_all_and_a_share_of_nothing_keeps_one(probe, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(model, inputs)
    with winnow.compress(model, probe(keep=9999)):
        assert same(generate(model, inputs), plain)
    with winnow.compress(model, probe(keep=0.001)) as handle:
        forward(model, inputs)
        assert [len(item.kept) for item in handle.last.items] == [1, 1, 1]


@pytest.mark.parametrize("probe", [Pick, Received, Tapped, Probed])
def test_B2_a_picture_of_one_token(probe):
    """2 × 2 patches of Qwen2.5-VL: there is nothing to choose, and nothing stumbles over it."""
    model, inputs = zoo.model("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", ("3 D 6", "3 A 2"))
    with winnow.compress(model, probe()) as handle:
        forward(model, inputs)
        assert handle.last.items[0].kept.tolist() == [0]
        assert handle.last.items[0].n_visual == 1


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_B3_without_pictures_nothing_happens_and_nobody_warns(build):
    model, inputs = zoo.model(build), zoo.inputs(build, ("5", "9"))
    plain = generate(model, inputs)
    with warnings.catch_warnings(), winnow.compress(model, Plan((Tapped(), Probed()))) as handle:
        warnings.simplefilter("error")
        assert same(generate(model, inputs), plain)
        assert handle.last is None or handle.last.items == ()


@pytest.mark.parametrize("plan", ["fastv:layer=-1", "fastv:layer=4", "fastv:layer=1.5", "fastv:layer=two"])
def test_B4_a_layer_out_of_range_is_refused(plan):
    with pytest.raises(winnow.WinnowError, match="layer"):
        winnow.compress(zoo.model("llava_clip"), plan)


def test_B4_the_message_says_how_deep_the_model_is_and_what_a_layer_means():
    with pytest.raises(winnow.WinnowError, match=r"4 LM layers.*before layer 0 … 3"):
        winnow.compress(zoo.model("llava_clip"), "fastv:layer=4")


@pytest.mark.parametrize("layers", ["[1,1,2]", "[2,1,3]", "[1,2,4]", "[-1,1,2]", "[1,2]"])
def test_B4_layers_that_repeat_or_run_backwards_or_leave_the_model_are_refused(layers):
    with pytest.raises(winnow.WinnowError, match="layer"):
        winnow.compress(zoo.model("llava_clip"), f"pyramiddrop:layers={layers}")


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_B4_layer_k_means_before_layer_k_and_the_last_layer_is_allowed(build):
    """`layer=3` of four: three layers read everything, the last one the rest."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, Tapped(keep=4, layer=3)) as handle:
        forward(model, inputs)
        lengths = [layer[0] for layer in handle.last.layer_tokens]
    full = inputs["input_ids"].shape[1]
    assert lengths == [full, full, full, full - handle.last.items[0].n_visual + 4]


@pytest.mark.parametrize("ratios", ["[]", "50%", "[50%,0,10%]", "[50%,25%]"])
def test_B6_budgets_of_the_wrong_number_are_refused(ratios):
    with pytest.raises(winnow.WinnowError, match=r"ratios|layers|keep="):
        winnow.compress(zoo.model("llava_clip"), f"pyramiddrop:ratios={ratios},layers=[1,2,3]")


@pytest.mark.parametrize(
    ("plan", "hint"),
    [
        ("fastervlmm:keep=3", "fastervlm"),
        ("fast-v", "fastv"),
        ("divprune:kep=3", "keep"),
        ("hiprune:alhpa=0.2", "alpha"),
    ],
)
def test_B7_a_typo_is_answered_with_the_nearest_name(plan, hint):
    with pytest.raises(winnow.WinnowError, match=f"Did you mean.*{hint}"):
        winnow.compress(zoo.model("llava_clip"), plan)


@pytest.mark.parametrize("plan", ["", "   ", ":", "fastv:keep", "fastv:keep=", "fastv +", "fastv | x=1", 7, b"fastv"])
def test_B7_what_is_no_plan_is_refused_in_our_own_words(plan):
    with pytest.raises(winnow.WinnowError):
        winnow.compress(zoo.model("llava_clip"), plan)


@pytest.mark.parametrize("plan", ["fastervlm:row=VisionAttention(query=cls)", "vtc-cls", "visionzip"])
@pytest.mark.parametrize("build", ["llava_siglip", "qwen2_5_vl"])
def test_B8_a_method_that_needs_cls_is_refused_at_compress(build, plan):
    model = zoo.model(build)
    before = snapshot(model)
    with pytest.raises(winnow.UnsupportedError, match=r"no \[CLS\] token|projected, layers"):
        winnow.compress(model, plan)
    assert differences(before, snapshot(model)) == []


def test_B8_the_default_method_runs_on_every_family():
    """`keep=` alone must not depend on a [CLS] token."""
    for build in zoo.BUILDS:
        model = zoo.model(build)
        with winnow.compress(model, keep=0.25) as handle:
            forward(model, zoo.inputs(build, zoo.RAGGED))
            assert all(len(item.kept) == max(1, int(item.n_visual / 4 + 0.5)) for item in handle.last.items)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_B9_two_methods_run_in_the_order_of_the_data_and_the_total_is_told(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, Plan((Probed(shares=(6, 4, 2)), Pick(keep=8)))) as handle:
        forward(model, inputs)
        ledger = handle.last
    item, text = ledger.items[0], inputs["input_ids"].shape[1] - ledger.items[0].n_visual
    assert [slug for _, slug, _ in item.reductions] == ["pick", "probed", "probed", "probed"]
    assert [layer[0] - text for layer in ledger.layer_tokens] == [8, 6, 4, 2]
    assert ledger.average_tokens == sum(layer[0] for layer in ledger.layer_tokens) / zoo.DEPTH
    assert ledger.plan == handle.plan.key
    assert item.provenance().m == 2


def test_B9_a_method_that_must_be_first_says_so():
    """VisionZip needs all tokens of the tower."""
    plan = Plan((Pick(keep=5, at="features"), winnow.plan("visionzip:keep=5").methods[0]))
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.SINGLE)
    with winnow.compress(model, plan), pytest.raises(winnow.WinnowError, match="first"):
        forward(model, inputs)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_B10_a_budget_changed_while_generating_applies_to_the_next_request(build):
    """The prompt was reduced once; what comes later in this request goes on from there."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    contexts = []

    class Change(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == inputs["input_ids"].shape[1] + 2:
                context = handle.using(Pick(keep=2))
                context.__enter__()
                contexts.append(context)
            return scores

    with winnow.compress(model, Pick(keep=7)) as handle:
        expected = generate(model, inputs)
        changed = generate(model, inputs, logits_processor=LogitsProcessorList([Change()]))
        assert same(changed, expected)
        assert [len(item.kept) for item in handle.last.items] == [7, 7, 7]
        forward(model, inputs)
        assert [len(item.kept) for item in handle.last.items] == [2, 2, 2]
        contexts[0].__exit__(None, None, None)
        assert same(generate(model, inputs), expected)


@dataclass(frozen=True)
class Wrong(Method):
    """Breaks a promise of the contract, in one of several ways."""

    how: str = ""
    slug: ClassVar[str] = "wrong"

    def reduce(self, view: View) -> Reduction:
        index = torch.arange(view.n).expand(view.b, -1)
        if self.how == "sources":
            return Reduction.select(index[:, :3], view.n + 1)
        if self.how == "lanes":
            return Reduction.select(index[0], view.n)
        if self.how == "more":
            return Reduction.select(torch.cat([index, index], 1), view.n)
        raise AssertionError(self.how)


@pytest.mark.parametrize("how", ["sources", "lanes", "more"])
def test_a_method_that_breaks_the_contract_is_named(how):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    with winnow.compress(model, Wrong(how)), pytest.raises(winnow.WinnowError, match="wrong returned"):
        forward(model, inputs)


def test_what_is_known_of_a_model_is_right():
    for build in zoo.BUILDS:
        with winnow.compress(zoo.model(build), "fastv") as handle:
            info: ModelInfo = handle.info
        assert (info.depth, info.width) == (zoo.DEPTH, 64)
        assert info.vision_depth == {"llava_clip": 5, "llava_siglip": 4, "llava_next": 5, "qwen2_5_vl": 4}[build]
        assert info.has_cls == (build in zoo.WITH_CLS)
        assert info.mrope == (build == "qwen2_5_vl")
        assert info.merge == (2 if build == "qwen2_5_vl" else 1)
