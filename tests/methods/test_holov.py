"""HoloV: quotas of strips, ranking by attention and diversity, and as released by attention alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.holov import HoloV
from winnow.testing import Picture

from .stubs import STUBS, first_k, ids, scores, tokens

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)


def _strips(n, crops):
    parts, start = [], 0
    for i in range(crops):
        size = n // crops + (i < n % crops)
        parts.append(list(range(start, start + size)))
        start += size
    return [part for part in parts if part]


def _measured(x, attention, part, alpha):
    """The scores of one strip, from its matrix of similarities."""
    a = attention[part] * 1e3
    if len(part) == 1:
        return a, attention[part].mean()
    unit = x[part] / (x[part].norm(dim=1, keepdim=True) + 1e-6)
    alike = (unit @ unit.T) * (1 - torch.eye(len(part)))
    mean = alike.sum(1) / (len(part) - 1)
    variance = ((alike - mean[:, None]) ** 2).sum(1) / (len(part) - 1)
    score = a + alpha * variance * a.abs().mean() / (variance.abs().mean() + 1e-6)
    return score, score.mean()


def _quotas(means, k):
    weight = torch.stack(means) / (torch.stack(means).sum() + 1e-6)
    quota = (weight * k).floor().long()
    best = weight.topk(min(int(k - quota.sum()), len(means))).indices
    quota[best] += 1
    return quota.tolist()


def _naive(x, attention, keep, crops, alpha=1.0):
    parts = _strips(len(x), crops)
    found = [_measured(x, attention, part, alpha) for part in parts]
    score = torch.cat([s for s, _ in found]).tolist()
    kept = set()
    for part, quota in zip(parts, _quotas([m for _, m in found], keep), strict=True):
        kept |= set(sorted(part, key=lambda j: -score[j])[:quota])
    rest = sorted((j for j in range(len(x)) if j not in kept), key=lambda j: -score[j])
    return sorted(kept | set(rest[: keep - len(kept)]))


def _is_the_paper(reduce):
    for seed in range(6):
        n = 60 + seed
        x, attention = tokens(seed, n), scores(seed + 9, n)
        for keep, crops in ((1, 4), (7, 5), (16, 16), (31, 7), (50, 3)):
            found = ids(reduce(View.of(x, attention), keep, crops))
            assert found == _naive(x[0], attention[0], keep, crops)


@pytest.mark.system("holov", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(lambda view, keep, crops: HoloV(keep=keep, crops=crops).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(lambda view, keep, crops: stub(view, keep))


def _released(x, attention, keep, crops=16):
    """The steps of the code, without the zeros with which it pads."""
    parts = _strips(len(x), crops)
    kept = []
    for part, quota in zip(parts, _quotas([_measured(x, attention, p, 0.09)[1] for p in parts], keep), strict=True):
        best = attention[part].topk(min(quota, len(part))).indices.tolist() if quota < len(part) else range(len(part))
        kept += [part[j] for j in best]
    return kept[:keep]


@pytest.mark.system("holov", "exact")
@pytest.mark.parametrize(("n", "keep"), [(576, 64), (576, 128), (576, 192), (300, 64), (2344, 320), (20, 8), (9, 4)])
def test_released_keeps_what_the_code_keeps_in_its_order(n, keep):
    (step,) = Plan.of(f"holov:released,keep={keep}").methods[0].bind(LLAVA)[1]
    assert step.needs[0].query == "cls"
    for seed in range(3):
        x, attention = tokens(seed, n), scores(seed + 5, n) ** 4
        action = step.act(View.of(x, attention), None)[0]
        assert action.separators == "drop"
        assert ids(action.reduction) == _released(x[0], attention[0], keep)
        assert not action.reduction.ordered


@pytest.mark.system("holov", "exact")
def test_released_loses_what_a_strip_cannot_take():
    attention = torch.full((2, 160), 1e-4)
    attention[0, 20:30] = 1.0  # one strip of ten holds nearly all
    view = View.of(tokens(1, 160, b=2), attention)
    found = HoloV.as_released(keep=32).reduce(view)
    assert found.counts == (10, 32)
    assert sorted(found.lane(0).index.tolist()) == list(range(20, 30))
    assert HoloV(keep=32).reduce(view).m == 32


@pytest.mark.system("holov", "exact")
def test_quotas_follow_attention_whatever_diversity_weighs():
    """The scaling makes the mean of the variance that of the attention, so that a strip's share is the same."""
    for seed in range(4):
        view = View.of(tokens(seed, 96), scores(seed, 96) ** 3)
        parts = [
            [len(set(ids(HoloV(keep=30, crops=8, diversity=d).reduce(view))) & set(p)) for p in _strips(96, 8)]
            for d in (0.0, 0.09, 1.0, 5.0)
        ]
        assert parts[0] == parts[1] == parts[2] == parts[3]


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 50))
def test_count_is_exact(keep, crops, seed):
    view = View.of(tokens(seed, 48), scores(seed, 48) ** 6)
    kept = ids(HoloV(keep=keep, crops=crops).reduce(view))
    assert kept == sorted(set(kept))
    assert len(kept) == min(keep, 48)


def test_crops_follow_the_budget_as_in_the_code_for_qwen():
    x, attention = tokens(0, 576), scores(0, 576)
    for keep in (64, 128, 192):
        crops = max(1, int(((1024 / 576) * 576) / keep))
        view = View.of(x, attention)
        assert ids(HoloV(keep=keep).reduce(view)) == ids(HoloV(keep=keep, crops=crops).reduce(view))


@pytest.mark.system("holov", "exact")
def test_tiles_are_cut_as_one_sequence_without_newlines():
    layout = Picture.tiled(5, 2, 2).lm
    n = layout.n_content
    x, attention = tokens(3, n), scores(3, n)
    found = HoloV(keep=30, crops=16).reduce(View.of(x, attention, layout=layout))
    assert ids(found) == _naive(x[0], attention[0], 30, 16)


def test_a_broken_token_is_kept_last():
    x, attention = tokens(4, 32), scores(4, 32)
    x[0, 5], attention[0, 9] = torch.nan, torch.nan
    view = View.of(x, attention)
    assert ids(HoloV(keep=30, crops=4).reduce(view)) == [j for j in range(32) if j not in (5, 9)]
    assert int(view.notes["nan_scores"]) == 2


@pytest.mark.parametrize("wrong", [{"crops": 0}, {"diversity": -1}, {"by": "variance"}, {"order": "score"}])
def test_settings_that_do_not_go(wrong):
    with pytest.raises(WinnowError, match="holov"):
        HoloV(**wrong)


def _finds_more_than_blind(sample, select):
    """More of the evidence, and of all things, than blind selections."""
    from tests.methods.directional import at_random, evenly, gap

    for k in (32, 13):
        kept = sample.kept(select, k)
        for blind in (evenly, at_random):
            for mask in (sample.evidence, sample.objects):
                assert gap(sample.recall(kept, mask), sample.recall(sample.kept(blind, k), mask)).low > 0


@pytest.mark.system("holov", "directional")
@pytest.mark.xdist_group("samples")
def test_finds_more_than_blind(sample):
    _finds_more_than_blind(sample, lambda v, k: HoloV(keep=k).reduce(v))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", ["first_k", "evenly", "at_random"])
def test_finding_fails_for_a_stub(sample, stub):
    from tests.methods import directional

    with pytest.raises(AssertionError):
        _finds_more_than_blind(sample, first_k if stub == "first_k" else getattr(directional, stub))
