"""VisPruner by its card: exact count for any share, the worked example, the released loop, and distinct tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.directional import at_random, evenly, gap
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.vispruner import FEATURES, VisPruner
from winnow.signals.features import VisionFeatures
from winnow.signals.vision import VisionAttention
from winnow.testing import WITH_CLS, WITHOUT_CLS, Picture

from .stubs import STUBS, first_k, ids, scores, tokens

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)


def _released(features, attention, budget, share):
    """The loop of the authors' code for one tile, on lists, where that code runs through; None where it fails."""
    alike = normalize(features.double(), dim=-1)
    alike = (alike @ alike.T).tolist()
    order = sorted(range(len(attention)), key=lambda j: -attention[j])
    first = int(budget * share)
    kept, rest, wanted = order[:first], order[first:], budget - first
    while wanted > 0:
        drop = min(8, len(rest) - wanted)
        if drop <= 0:
            break
        even, odd = rest[0::2], rest[1::2]
        if len(even) != len(odd) or drop > len(even):
            return None
        by_likeness = sorted(even, key=lambda i: -max(alike[i][j] for j in odd))
        rest = by_likeness[drop:] + odd
    return sorted(kept + (rest if wanted > 0 else []))


def _example(reduce):
    """The card's: of eight tokens two pairs of duplicates lose one each."""
    features = torch.eye(6)[[0, 1, 2, 3, 3, 4, 5, 5]][None]
    attention = torch.tensor([[0.30, 0.20, 0.14, 0.12, 0.10, 0.06, 0.05, 0.03]])
    assert ids(reduce(View.of(features, attention), 6)) == [0, 1, 2, 3, 5, 7]


@pytest.mark.system("vispruner", "exact")
def test_the_worked_example():
    _example(lambda view, k: VisPruner(keep=k, important=1 / 3).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_example_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _example(stub)


def _is_the_code(reduce, side=12):
    ran = 0
    for seed, (budget, share) in enumerate([(64, 0.5), (64, 0.75), (32, 0.5), (24, 0.25), (40, 0.0), (16, 1.0)]):
        x, attention = tokens(seed, side * side), scores(seed, side * side)
        want = _released(x[0], attention[0].tolist(), budget, share)
        if want is not None:
            ran += 1
            assert ids(reduce(View.of(x, attention, layout=Layout.grid(side, side)), budget, share)) == want
    assert ran >= 4


@pytest.mark.system("vispruner", "exact")
def test_equals_the_released_loop():
    _is_the_code(lambda view, budget, share: VisPruner(keep=budget, important=share).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_loop_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_code(lambda view, budget, share: stub(view, budget))


@pytest.mark.system("vispruner", "exact")
@pytest.mark.parametrize(("budget", "share"), [(128, 0.5), (64, 0.75)])
def test_released_on_a_tile_of_576(budget, share):
    (method,) = Plan.of(f"vispruner:released,keep={budget},important={share}").methods
    ((step,), x, attention) = method.bind(LLAVA)[1], tokens(2, 577), scores(2, 576)
    assert (str(step.at), step.needs) == ("features", (VisionAttention(22),))
    view = View.of(x, step.signals(lambda signal: attention), layout=Picture.grid(24, 24).tower)
    want = _released(x[0, 1:], attention[0].tolist(), budget, share)
    assert ids(step.act(view, State())[0].reduction) == [1 + j for j in want]


@pytest.mark.system("vispruner", "exact")
def test_released_gives_each_tile_the_same_number_of_all_its_patches():
    picture = Picture.tiled(6, 2, 2)
    (method,) = Plan.of("vispruner:released,keep=80").methods
    ((step,), x, attention) = method.bind(LLAVA)[1], tokens(3, 185), scores(3, 180)
    view = View.of(x, step.signals(lambda signal: attention), layout=picture.tower, n_visual=140)
    want = []
    for t in range(5):
        own = attention[0, 36 * t : 36 * (t + 1)].tolist()
        want += [37 * t + 1 + j for j in _released(x[0, 37 * t + 1 : 37 * (t + 1)], own, 16, 0.5)]
    assert ids(step.act(view, State())[0].reduction) == want


@pytest.mark.system("vispruner", "exact")
@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 1])
@pytest.mark.parametrize("n", [40, 41])
def test_count_is_exact_for_every_budget(n, share):
    view = View.of(tokens(n, n), scores(n, n))
    for budget in range(1, n + 1):
        kept = ids(VisPruner(keep=budget, important=share).reduce(view))
        assert len(set(kept)) == budget
        assert kept == sorted(kept)


@pytest.mark.system("vispruner", "exact")
@pytest.mark.parametrize("keep", [1, 2, 7, 20, 33, 47, 48, 60])
def test_share_of_one_is_fastervlm(keep):
    seed = keep
    for layout in (Layout.grid(6, 8), Picture.tiled(4, 2, 1).lm):
        view = View.of(tokens(seed, 48), scores(seed, 48), layout=layout)
        assert ids(VisPruner(keep=keep, important=1.0).reduce(view)) == ids(FasterVLM(keep=keep).reduce(view))


@pytest.mark.system("vispruner", "exact")
def test_permuted_heads_change_nothing():
    """The signal is a mean over heads; so is what the method sees."""
    heads = torch.rand(1, 8, 64, generator=torch.Generator().manual_seed(0)).double()
    x = tokens(4, 64)
    found = [VisPruner(keep=20).reduce(View.of(x, heads[:, p].mean(1))) for p in (range(8), [3, 1, 7, 0, 2, 6, 5, 4])]
    assert ids(found[0]) == ids(found[1])


@pytest.mark.system("vispruner", "exact")
def test_a_batch_is_its_items():
    for layout in (Layout.grid(6, 8), Picture.tiled(4, 2, 1).lm):
        x, attention, method = tokens(6, 48, b=3), scores(6, 48, b=3), VisPruner(keep=17)
        together = method.reduce(View.of(x, attention, layout=layout))
        for i in range(3):
            alone = method.reduce(View.of(x[i : i + 1], attention[i : i + 1], layout=layout))
            assert ids(alone) == ids(together, i)


def _drops_a_duplicate_first(reduce):
    """One pair on the two sides of the list: whichever budget, the one on the even side goes before any other."""
    for place in (0, 6, 14):
        x = torch.eye(24)[None].clone()
        x[0, place + 1] = x[0, place]  # of a list in descending attention
        kept = ids(reduce(View.of(x, torch.linspace(1, 0.1, 24)[None]), 23))
        assert kept == [j for j in range(24) if j != place]


@pytest.mark.system("vispruner", "exact")
def test_a_duplicate_across_the_sides_goes_before_distinct_tokens():
    _drops_a_duplicate_first(lambda view, k: VisPruner(keep=k, important=0).reduce(view))


@pytest.mark.parametrize("stub", [*STUBS, lambda view, k: FasterVLM(keep=k).reduce(view)])
def test_a_duplicate_going_first_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _drops_a_duplicate_first(stub)


def test_broken_tokens_are_not_kept():
    x, attention = tokens(1, 60), scores(1, 60)
    x[0, 5], attention[0, 17] = torch.inf, torch.nan
    view = View.of(x, attention)
    for share in (0, 0.5, 1):
        kept = ids(VisPruner(keep=57, important=share).reduce(view))
        assert len(kept) == 57
        assert not {5, 17} & set(kept)
    assert int(view.notes["nan_scores"]) == 6


def test_features_of_the_tower_are_compared_where_they_are_given():
    x, features, attention = tokens(1, 40), tokens(2, 40), scores(1, 40)
    row = VisionAttention(query="auto")
    given = VisPruner(keep=12).reduce(View.of(x, {row: attention, FEATURES: features}))
    assert ids(given) == ids(VisPruner(keep=12).reduce(View.of(features, attention)))
    assert ids(given) != ids(VisPruner(keep=12).reduce(View.of(x, attention)))


def test_half_precision_is_compared_in_fp32():
    x, attention = tokens(1, 64).bfloat16(), scores(1, 64).bfloat16()
    half = VisPruner(keep=20).reduce(View.of(x, attention))
    assert ids(half) == ids(VisPruner(keep=20).reduce(View.of(x.float(), attention.float())))


def test_after_an_earlier_method_each_tile_has_what_is_left_of_it():
    layout = Picture.tiled(4, 2, 1).lm
    left = torch.tensor([[0, 1, 2, 3, 4, 20, 21, 40, 41, 42]])
    view = View(tokens(0, 10), layout, left, 48, {}, scores(0, 10))
    kept = left[0, ids(VisPruner(keep=6).reduce(view))]
    assert torch.bincount(torch.tensor(layout.tiles)[kept]).tolist() == [2, 2, 2]


def test_what_it_reads():
    for info, needs in (
        (WITH_CLS, (VisionAttention(10), VisionFeatures(10))),
        (WITHOUT_CLS, (VisionAttention(7, query="all"),)),
    ):
        (step,) = VisPruner().checked_steps(info)
        assert (str(step.at), step.needs) == ("projected", needs)


@pytest.mark.parametrize("wrong", [{"important": 1.5}, {"by": "keys"}, {"keep": 0}])
def test_bad_settings(wrong):
    with pytest.raises(WinnowError, match=f"vispruner: {next(iter(wrong))}="):
        VisPruner(**wrong)


def _scene(seed):
    """16 × 16 features and attention: a bright object of near-identical patches, and four small ones, less bright."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, generator=generator) + 0.3 * torch.randn(16, 16, 32, generator=generator)
    attention = 0.1 * torch.rand(16, 16, generator=generator)
    boxes = [(1, 1, 7, 7), (1, 11, 2, 2), (6, 13, 2, 2), (11, 2, 2, 2), (12, 10, 2, 2)]
    things = torch.zeros(5, 16, 16, dtype=torch.bool)
    for thing, (row, col, h, w) in enumerate(boxes):
        things[thing, row : row + h, col : col + w] = True
        x[things[thing]] = 2 * torch.randn(32, generator=generator) + 0.05 * torch.randn(h * w, 32, generator=generator)
        attention[things[thing]] += 1.0 if thing == 0 else 0.05
    return View.of(x.flatten(0, 1)[None], attention.flatten()[None], layout=Layout.grid(16, 16)), things.flatten(1)


def _on_scenes(select):
    """Small objects that are hit, the share of the bright one that is kept, and the mean cosine of kept tokens."""
    found = []
    for seed in range(20):
        view, things = _scene(seed)
        reduction = select(view, 32)
        kept = reduction.kept[0]
        x = normalize(reduction.apply(view.tokens)[0], dim=-1)
        found.append(((things[1:] & kept).any(1).sum(), (things[0] & kept).sum() / things[0].sum(), (x @ x.T).mean()))
    return np.array(found, dtype=float).T


def _important_and_random(view, k):
    """Half by attention, the other half at random: what the rounds are for is missing."""
    best = view[VisionAttention()].topk(k // 2, 1).indices
    noise = torch.rand(view.b, view.n, generator=torch.Generator().manual_seed(1)).scatter(1, best, 2.0)
    return Reduction.select(noise.topk(k, 1).indices.sort(1).values, view.n)


def _hits_more_and_repeats_less(select):
    hit, bright, alike = _on_scenes(select)
    cls_hit, cls_bright, cls_alike = _on_scenes(lambda view, k: FasterVLM(keep=k).reduce(view))
    assert gap(hit, cls_hit).low > 0
    assert gap(cls_bright, bright).low > 0
    assert gap(bright, _on_scenes(evenly)[1]).low > 0
    for other in (cls_alike, _on_scenes(_important_and_random)[2]):
        assert gap(alike, other).high < 0


@pytest.mark.system("vispruner", "directional")
def test_hits_more_objects_than_fastervlm_and_keeps_fewer_duplicates_than_chance():
    _hits_more_and_repeats_less(lambda view, k: VisPruner(keep=k).reduce(view))


@pytest.mark.parametrize("stub", [first_k, evenly, at_random, _important_and_random])
def test_hits_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _hits_more_and_repeats_less(stub)


def _at_features(sample):
    """Views of all patches as the tower gives them, with [CLS] attention."""
    for tower, projected in zip(sample.views["features"], sample.views["projected"], strict=True):
        yield View.of(tower.tokens[:, 1:], projected[VisionAttention(query="auto")], layout=projected.layout)


def _on_the_sample(sample, select, k):
    """The share of things that are hit, and the mean cosine of kept tokens, scene by scene."""
    kept, alike = [], []
    for view in _at_features(sample):
        reduction = select(view, k)
        kept.append(reduction.kept)
        x = normalize(reduction.apply(view.tokens).float(), dim=-1)
        alike.append((x @ x.mT).mean((1, 2)))
    hit = [float((own & mask).any(1).double().mean()) for own, mask in zip(sample.things, torch.cat(kept), strict=True)]
    return np.array(hit), torch.cat(alike).double().numpy()


def _hits_more_things_of_the_sample(sample, select):
    for k in (32, 13):
        hit, alike = _on_the_sample(sample, select, k)
        cls_hit, cls_alike = _on_the_sample(sample, lambda view, k: FasterVLM(keep=k).reduce(view), k)
        blind_alike = _on_the_sample(sample, _important_and_random, k)[1]
        more, less, least = gap(hit, cls_hit), gap(alike, cls_alike), gap(alike, blind_alike)
        assert more.low > 0
        assert less.high < 0
        assert least.high < 0


@pytest.mark.system("vispruner", "directional")
@pytest.mark.xdist_group("samples")
def test_hits_more_things_of_the_sample_with_fewer_duplicates_than_fastervlm(sample):
    _hits_more_things_of_the_sample(sample, lambda view, k: VisPruner(keep=k).reduce(view))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, evenly, at_random, _important_and_random])
def test_hits_of_the_sample_fail_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _hits_more_things_of_the_sample(sample, stub)
