"""Directional checks of the methods' papers on the bundled reference model, each shown to fail for a blind selection.

Every check takes what it checks as an argument, so that the same lines judge the method and the stubs. What the papers
say and this model does not show is no test here; docs/findings.md lists it, with the numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.directional import (
    SHARES,
    at_random,
    blind_cuts,
    by_lm,
    evenly,
    gap,
    lost,
    lower_less_upper,
    over,
    radius,
    spread,
)
from tests.methods.stubs import first_k
from winnow.core.budget import Budget
from winnow.core.reduction import Reduction
from winnow.methods.divprune import DivPrune
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.fastv import FastV
from winnow.methods.hiprune import HiPrune
from winnow.methods.pyramiddrop import PyramidDrop
from winnow.methods.todre import ToDRE
from winnow.methods.visionzip import VisionZip
from winnow.methods.vtc_cls import VtcCls
from winnow.signals.vision import VisionAttention

BLIND = pytest.mark.parametrize("stub", [first_k, evenly, at_random])


# The samples take half a minute to make: one worker makes them, for all tests of this group.
pytestmark = pytest.mark.xdist_group("samples")


def test_the_model_answers_the_sample(sample):
    """Nothing below means much on a model that does not read the pictures."""
    assert sample.right("full").mean() > 0.8


def fastervlm(view, k):
    return FasterVLM(keep=k).reduce(view)


def vtc_cls(view, k):
    return VtcCls(keep=k, layers=(3, 4)).reduce(view)  # from half of the tower's 6 blocks to the feature block


def hiprune(view, k):
    return HiPrune(keep=k, object_layer=1).reduce(view)  # the default for 6 blocks


def divprune(view, k):
    return DivPrune(keep=k).reduce(view)


def k_center(view, k):
    return ToDRE(keep=k, criterion="max").reduce(view)


def max_sum(view, k):
    return ToDRE(keep=k, criterion="sum").reduce(view)


def test_the_settings_are_the_defaults(sample):
    info = sample.handle.info
    assert VtcCls().bind(info)[0].layers == (3, 4)
    assert HiPrune().bind(info)[0].object_layer == 1


def _finds_more_than_blind(sample, select, shares=SHARES):
    """More of the evidence, and more of all things, than evenly spread tokens and than random ones."""
    for k in shares.values():
        kept = sample.kept(select, k)
        for blind in (evenly, at_random):
            other = sample.kept(blind, k)
            for mask in (sample.evidence, sample.objects):
                assert gap(sample.recall(kept, mask), sample.recall(other, mask)).low > 0


@pytest.mark.parametrize(
    "select",
    [
        pytest.param(fastervlm, marks=pytest.mark.system("fastervlm", "directional")),
        pytest.param(vtc_cls, marks=pytest.mark.system("vtc-cls", "directional")),
        pytest.param(hiprune, marks=pytest.mark.system("hiprune", "directional")),
    ],
)
def test_encoder_attention_finds_evidence_and_objects(sample, select):
    _finds_more_than_blind(sample, select)


@BLIND
def test_finding_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _finds_more_than_blind(sample, stub)


def _place_does_not_matter(samples, select):
    """A thing is kept as well in the lower half as in the upper one: within 8 points of recall, 64 tokens kept."""
    moved = lower_less_upper(*samples, *(s.kept(select, 64) for s in samples))
    assert moved.low > -0.08
    assert moved.high < 0.08


@pytest.mark.system("fastervlm", "directional")
def test_cls_attention_has_no_bias_for_a_place(samples):
    _place_does_not_matter(samples, fastervlm)


def test_no_bias_fails_for_a_stub(samples):
    with pytest.raises(AssertionError):
        _place_does_not_matter(samples, first_k)


def _anchors_see_what_their_block_sees(sample, select):
    """With all of the budget for anchors, things are kept better by the block whose attention lies better on them."""
    rows = {block: VisionAttention(block, query="all") for block in range(4)}
    overlap = {block: sample.overlap(sample.signal(row)).mean() for block, row in rows.items()}
    best, worst = max(overlap, key=overlap.get), min(overlap, key=overlap.get)
    found = [sample.recall(sample.kept(lambda v, k, b=b: select(v, k, b), 32), sample.objects) for b in (best, worst)]
    assert gap(*found).low > 0


@pytest.mark.system("hiprune", "directional")
def test_anchors_follow_the_objects_of_the_object_block(sample):
    _anchors_see_what_their_block_sees(sample, lambda v, k, b: HiPrune(keep=k, alpha=1.0, object_layer=b).reduce(v))


@BLIND
def test_anchors_fail_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _anchors_see_what_their_block_sees(sample, lambda v, k, b: stub(v, k))


def _finds_evidence_in_the_lm(sample, kept_of):
    for k in SHARES.values():
        for blind in (evenly, at_random):
            assert gap(sample.recall(kept_of(k)), sample.recall(sample.kept(blind, k))).low > 0


@pytest.mark.system("fastv", "directional")
def test_attention_of_the_last_token_finds_evidence_at_half_depth(sample):
    _finds_evidence_in_the_lm(sample, lambda k: by_lm(sample, 4, k))


@BLIND
def test_finding_in_the_lm_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _finds_evidence_in_the_lm(sample, lambda k: sample.kept(stub, k))


PYRAMID = (64, 16, 4)  # tokens after the cuts before layers 2, 4 and 6 of 8: 85 in the mean over layers
FASTV = 28  # after layer 2, of 256: also 85


def _beats_fastv_with_as_many_tokens(sample, method):
    """Right at least as often, though blind cuts at the same depths leave less of the evidence."""
    assert gap(sample.right(method), sample.right(FastV(keep=FASTV, layer=2))).low >= 0
    for blind in (evenly, at_random):
        assert gap(sample.left(method), sample.left(blind_cuts(blind, (2, 4, 6), PYRAMID))).low > 0


@pytest.mark.system("pyramiddrop", "directional")
def test_on_details_a_pyramid_is_right_at_least_as_often_as_fastv_with_as_many_tokens(sample):
    assert 2 * (256 + sum(PYRAMID)) == 2 * 256 + 6 * FASTV
    _beats_fastv_with_as_many_tokens(sample, PyramidDrop(ratios=tuple(map(Budget, PYRAMID))))


@BLIND
def test_pyramid_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _beats_fastv_with_as_many_tokens(sample, blind_cuts(stub, (2, 4, 6), PYRAMID))


def _covers(sample, select):
    """Kept tokens lie farther apart, and no token is as far from them, as with any blind selection or [CLS] ranking."""
    views = sample.views["projected"]
    for k in SHARES.values():
        own, *others = (
            [over(views, lambda v, s=s: measure(v, s(v, k))) for measure in (spread, radius)]  # noqa: B023
            for s in (select, evenly, at_random, fastervlm)
        )
        for other in others:
            assert gap(own[0], other[0]).low > 0
            assert gap(own[1], other[1]).high < 0


@pytest.mark.parametrize(
    "select",
    [
        pytest.param(divprune, marks=pytest.mark.system("divprune", "directional")),
        pytest.param(k_center, marks=pytest.mark.system("todre", "directional")),
    ],
)
def test_diverse_tokens_cover(sample, select):
    _covers(sample, select)


@BLIND
def test_cover_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _covers(sample, stub)


def _max_spreads_more_than_sum(sample, select):
    views = sample.views["projected"]
    own, sums, cls = (over(views, lambda v, s=s: spread(v, s(v, 13))) for s in (select, max_sum, fastervlm))
    assert gap(own, sums).low > 0
    assert gap(sums, cls).low > 0


@pytest.mark.system("todre", "directional")
def test_spread_of_max_is_above_that_of_sum_and_that_above_the_cls_ranking(sample):
    _max_spreads_more_than_sum(sample, k_center)


@pytest.mark.parametrize("stub", [first_k, max_sum])
def test_spread_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _max_spreads_more_than_sum(sample, stub)


def _represents_what_it_drops(sample, reduce):
    """At equal count, dropped patches are less than half as far from the nearest output as with FasterVLM."""
    tower, projected = sample.views["features"], sample.views["projected"]
    for k in (64, 32):
        own = over(tower, lambda v: lost(v, reduce(v, k)))  # noqa: B023
        kept = [Reduction.select(fastervlm(view, k).index + 1, view.n + 1) for view in projected]
        other = np.concatenate([lost(v, found) for v, found in zip(tower, kept, strict=True)])
        assert gap(own, other / 2).high < 0


@pytest.mark.system("visionzip", "directional")
def test_contextual_tokens_represent_what_is_dropped(sample):
    _represents_what_it_drops(sample, lambda v, k: VisionZip(keep=k).reduce(v))


@pytest.mark.parametrize("stub", ["first k", "no contextual tokens"])
def test_representation_fails_for_a_stub(sample, stub):
    first = lambda v, k: Reduction.select(torch.arange(k).expand(v.b, k), v.n)  # noqa: E731
    plain = lambda v, k: VisionZip(keep=k, contextual=0).reduce(v)  # noqa: E731
    with pytest.raises(AssertionError):
        _represents_what_it_drops(sample, first if stub == "first k" else plain)
