"""VisionDrop by its card: the released stages, the published schedule, and a choice that later text cannot change."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import zoo
from torch.nn.functional import normalize

import winnow
from tests.methods.directional import gap, lost, over
from winnow.core.budget import Budget
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.visiondrop import VisionDrop
from winnow.methods.visionzip import VisionZip
from winnow.signals.language import LMAttention, LMKeys
from winnow.signals.vision import VisionAttention, VisionKeys
from winnow.testing import WITHOUT_CLS, Picture

from .stubs import STUBS, scores, tokens

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)
ROW, KEYS = LMAttention(8, "items"), LMKeys(8)


def _merged(x, keys, rest, contextual):
    """Evenly spaced targets, each with the mean of those added whose keys are most like its own."""
    step = max(1, len(rest) // max(1, contextual))
    targets = rest[::step][:contextual]
    unit = normalize(keys.double(), dim=-1)
    joined = {t: [] for t in targets}
    for j in rest if targets else ():
        if j not in joined:
            joined[max(targets, key=lambda t: float(unit[j] @ unit[t]))].append(x[j])
    return [x[t] + (torch.stack(own).mean(0) if own else 0) for t, own in joined.items()]


def _stage(x, score, keys, dominant, contextual):
    """One stage of the authors' code for one picture in the LM."""
    best = sorted(sorted(range(len(score)), key=lambda j: -score[j])[:dominant])
    rest = [j for j in range(len(score)) if j not in best]
    return torch.stack([x[j] for j in best] + _merged(x, keys, rest, contextual))


def _lm_view(n, seed, b=1):
    x, row, keys = tokens(seed, n, b=b), scores(seed, n, b=b), tokens(seed + 1, n, 8, b=b)
    return View.of(x, {ROW: row, KEYS: keys}, n_visual=576), x, row, keys


def _is_the_code(cut):
    for seed, (n, stage, d, c) in enumerate([(48, 1, 30, 5), (35, 2, 22, 4), (26, 3, 16, 3)]):
        view, x, row, keys = _lm_view(n, seed, b=2)
        found = cut(view, stage, d + c).apply(x)
        for lane in range(2):
            want = _stage(x[lane], row[lane].tolist(), keys[lane], d, c)
            assert found[lane].shape == want.shape
            assert torch.allclose(found[lane], want, atol=1e-5)


@pytest.mark.system("visiondrop", "exact")
@pytest.mark.parametrize("contextual", [0.135, (6, 5, 4, 3)])
def test_stages_in_the_lm_equal_the_released_code(contextual):
    _is_the_code(lambda view, stage, k: VisionDrop(contextual=contextual).cut(view, stage, ROW, KEYS).reduction)


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_code(lambda view, stage, k: stub(view, k))


@pytest.mark.system("visiondrop", "exact")
def test_released_before_the_lm_is_42_dominant_and_6_contextual():
    step, *cuts = Plan.of("visiondrop:released").methods[0].bind(LLAVA)[1]
    assert [str(s.at) for s in (step, *cuts)] == ["features", "layers[8]", "layers[16]", "layers[24]"]
    assert [s.needs for s in cuts] == [(LMAttention(k, "items"), LMKeys(k)) for k in (8, 16, 24)]
    x, row, keys = tokens(0, 577), scores(0, 576), tokens(1, 577, 8)
    given = dict(zip(step.needs, (row, keys), strict=True))
    view = View.of(x, step.signals(given.__getitem__), layout=Picture.grid(24, 24).tower, n_visual=576)
    action = step.act(view, State())[0]
    best = sorted(sorted(range(576), key=lambda j: -row[0, j].item())[:41])
    rest = [j for j in range(576) if j not in best]
    want = torch.stack([x[0, 0], *(x[0, 1 + j] for j in best), *_merged(x[0, 1:], keys[0, 1:], rest, 6)])
    torch.testing.assert_close(action.reduction.apply(x)[0], want, rtol=1e-5, atol=1e-5)
    assert action.separators == "drop"


@pytest.mark.system("visiondrop", "exact")
@pytest.mark.parametrize("picture", [Picture.grid(6, 6), Picture.tiled(5, 2, 2)], ids=lambda p: p.name)
def test_without_cuts_and_contextual_tokens_it_is_visionzip_with_dominant_tokens_only(picture):
    n = picture.tower.n
    row, keys = VisionAttention(), VisionKeys()
    given = {row: scores(1, picture.tower.n_content, b=2), keys: tokens(2, n, 8, b=2)}
    view = View.of(tokens(0, n, b=2), given, layout=picture.tower, n_visual=picture.lm.n_content)
    for keep in (1, 4, 17):
        own = VisionDrop(tokens=(Budget(keep),), contextual=0.0).encode(view).reduction
        zipped = VisionZip(keep=keep, contextual=0, order="thumbnail").reduce(view)
        assert torch.equal(own.to_matrix(), zipped.to_matrix())
        assert own.representatives.tolist() == zipped.representatives.tolist()


@pytest.mark.system("visiondrop", "exact")
@pytest.mark.parametrize("contextual", [0.2, 0.0])
def test_first_stage_equals_visionzip_on_one_tile(contextual):
    given = {VisionAttention(): scores(1, 36, b=2), VisionKeys(): tokens(2, 37, 8, b=2)}
    view = View.of(tokens(0, 37, b=2), given, layout=Picture.grid(6, 6).tower, n_visual=36)
    own = VisionDrop(tokens=(Budget(15),), contextual=contextual).encode(view).reduction
    assert torch.equal(own.to_matrix(), VisionZip(keep=15, contextual=contextual).reduce(view).to_matrix())


@pytest.mark.system("visiondrop", "exact")
def test_the_mean_over_layers_is_the_published_budget():
    method = VisionDrop()
    assert [method._counts(i, budget.of(576)) for i, budget in enumerate(method.tokens)] == [
        (42, 6),
        (30, 5),
        (22, 4),
        (16, 3),
    ]
    sizes, starts = (
        [budget.of(576) for budget in method.tokens],
        [0, *(s.at.index for s in method.checked_steps(LLAVA)[1:]), 32],
    )
    assert Fraction(sum(n * (b - a) for n, a, b in zip(sizes, starts, starts[1:], strict=False)), 32) == 32


def _later_text_changes_nothing(plan):
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    ids = sample["input_ids"].clone()
    ids[0, -6:] = torch.tensor([11, 57, 190, 23, 88, 140])
    found = []
    with winnow.compress(model, plan) as handle, torch.no_grad():
        for given in (sample, {**sample, "input_ids": ids}):
            model(**given)
            found.append([r.representatives.tolist() for _, _, r in handle.last.items[0].reductions])
    assert found[0] == found[1]


@pytest.mark.system("visiondrop", "exact")
def test_text_behind_the_picture_changes_nothing():
    _later_text_changes_nothing("visiondrop:tokens=[20,14,9,5]")


@pytest.mark.parametrize("plan", ["fastv:keep=9", "pyramiddrop:ratios=[14,9,5]"])
def test_text_behind_the_picture_changes_what_text_chooses(plan):
    with pytest.raises(AssertionError):
        _later_text_changes_nothing(plan)


@pytest.mark.system("visiondrop", "exact")
def test_layers_hold_the_tokens_of_their_stage():
    model, samples = zoo.model("llava_next"), zoo.samples("llava_next", ("3 A 6", "2 B 4"))
    plain = "visiondrop:tokens=[40,20,9,5],contextual=[6,5,3,0]"
    with winnow.compress(model, plain) as handle, torch.no_grad():
        model(**zoo.collate(samples))
        text = [11, 8]  # the marks of beginning and end of a picture included
        assert [[n - t for n, t in zip(layer, text, strict=True)] for layer in handle.last.layer_tokens] == [
            [40, 40],
            [20, 20],
            [9, 9],
            [5, 5],
        ]


def test_divided_by_those_that_can_see_it_a_uniform_causal_attention_is_flat():
    n = 12
    causal = torch.ones(n, n).tril()
    row = (causal / causal.sum(1, keepdim=True)).mean(0)[None] * torch.linspace(1, 1.2, n)
    view = View.of(tokens(0, n), {ROW: row, KEYS: tokens(1, n, 8)})
    kept = {v: VisionDrop(tokens=(12, 4), contextual=0, visible=v).cut(view, 1, ROW, KEYS) for v in (False, True)}
    assert kept[False].reduction.representatives.tolist() == [[0, 1, 2, 3]]
    want = (row[0] / torch.arange(n, 0, -1)).topk(4).indices.sort().values
    assert kept[True].reduction.representatives[0].tolist() == want.tolist()


def test_ties_go_to_the_first_and_broken_tokens_are_not_dominant():
    view, x, row, keys = _lm_view(20, 3)
    flat = View.of(x, {ROW: torch.ones_like(row), KEYS: keys})
    assert VisionDrop(tokens=(20, 7), contextual=0).cut(flat, 1, ROW, KEYS).reduction.representatives[0].tolist() == [
        *range(7)
    ]
    row[0, row.argmax()] = torch.nan
    found = VisionDrop(tokens=(20, 19), contextual=0).cut(view, 1, ROW, KEYS).reduction
    assert int(row.isnan().nonzero()[0, 1]) not in found.representatives[0].tolist()
    assert int(view.notes["nan_scores"]) == 1


def test_half_precision_is_ranked_in_fp32():
    _, x, row, keys = _lm_view(30, 4)
    half = View.of(x.bfloat16(), {ROW: row.bfloat16(), KEYS: keys.bfloat16()})
    wide = View.of(x, {ROW: row.bfloat16().float(), KEYS: keys.bfloat16().float()})
    a, b = (VisionDrop(tokens=(30, 12)).cut(v, 1, ROW, KEYS).reduction for v in (half, wide))
    assert torch.equal(a.to_matrix(), b.to_matrix())


def test_tiles_share_the_first_stage():
    picture = Picture.tiled(5, 2, 2)
    given = {VisionAttention(): scores(1, 125), VisionKeys(): tokens(2, 130, 8)}
    view = View.of(tokens(0, 130), given, layout=picture.tower, n_visual=90)
    found = VisionDrop(tokens=(Budget(48),), contextual=(7,)).encode(view).reduction
    tile = found.representatives[0] // 26
    assert torch.bincount(tile).tolist() == [10, 10, 10, 9, 9]
    assert int((found.mass[0] > 1.5).sum()) == 7


@pytest.mark.parametrize(("budget", "want"), [(19, [48, 35, 26, 19]), (38, [96, 70, 52, 38]), ("100%", ["100%"] * 4)])
def test_at_another_budget_the_schedule_is_scaled(budget, want):
    assert [b.value for b in VisionDrop().at_budget(budget, 576).tokens] == want


def test_on_a_shallow_lm_the_last_of_coinciding_cuts_holds():
    steps = VisionDrop().checked_steps(ModelInfo(depth=2, vision_depth=24, feature_layer=-2))
    assert [str(step.at) for step in steps] == ["features", "layers[0]", "layers[1]"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layers": (8, 16)}, "3 ascending layers"),
        ({"layers": (8, 24, 16)}, "3 ascending layers"),
        ({"contextual": 1.0}, "a share below 1"),
        ({"contextual": (6, 5)}, "4 numbers"),
    ],
)
def test_bad_settings(wrong, said):
    with pytest.raises(WinnowError, match=said):
        VisionDrop(**wrong)


def test_needs_cls():
    with pytest.raises(UnsupportedError, match=r"no \[CLS\]"):
        VisionDrop().checked_steps(WITHOUT_CLS)


def _represents_what_it_drops(sample, reduce):
    """At equal count, dropped patches are less than half as far from the nearest output as with FasterVLM."""
    tower, projected = sample.views["features"], sample.views["projected"]
    for k in (64, 48):
        own = over(tower, lambda view: lost(view, reduce(view, k)))  # noqa: B023
        kept = [Reduction.select(FasterVLM(keep=k).reduce(view).index + 1, view.n + 1) for view in projected]
        other = np.concatenate([lost(view, found) for view, found in zip(tower, kept, strict=True)])
        less = gap(own, other / 2)
        assert less.high < 0


@pytest.mark.system("visiondrop", "directional")
@pytest.mark.xdist_group("samples")
def test_contextual_tokens_represent_what_the_first_stage_drops(sample):
    _represents_what_it_drops(sample, lambda view, k: VisionDrop(tokens=(Budget(k),)).encode(view).reduction)


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", ["first k", "no contextual tokens"])
def test_representation_fails_for_a_stub(sample, stub):
    first = lambda view, k: Reduction.select(torch.arange(k).expand(view.b, k), view.n)  # noqa: E731
    plain = lambda view, k: VisionDrop(tokens=(Budget(k),), contextual=0.0).encode(view).reduction  # noqa: E731
    with pytest.raises(AssertionError):
        _represents_what_it_drops(sample, first if stub == "first k" else plain)
