"""Token-level Correlation-guided Compression by its card: what is not repeated in a crop sets its count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.directional import at_random, gap
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.view import View
from winnow.methods.token_correlation_compression import TokenCorrelationCompression as Compression
from winnow.signals.vision import VisionAttention, VisionKeys
from winnow.testing import Picture

from .stubs import STUBS, first_k, ids, scores, tokens, uniform

KEYS, DEEP, MIDDLE = Compression().signals()
TILED = Picture.tiled(5, 2, 3).lm  # a thumbnail and six crops of 25 tokens


def _view(keys, deep, middle, layout):
    signals = {KEYS: keys, DEEP: deep, MIDDLE: middle}
    return View.of(tokens(0, layout.n_content, 4, b=len(keys)), signals, layout=layout)


def _keys(seed, n, different=None):
    """Keys of which all but `different` are equal."""
    keys = tokens(seed, n, 64)
    if different is not None:
        rest = [j for j in range(n) if j not in set(different)]
        keys[:, rest] = keys[:, rest[:1]]
    return keys


def _naive(keys, deep, middle, layout, similar=0.9, partners=0.02, least=1):
    """One item, tile by tile, as the card says it."""
    unit = normalize(keys.double(), dim=-1)
    tiles, kept = layout.tiles, []
    for t in range(tiles.max() + 1):
        mine = [j for j in range(len(keys)) if tiles[j] == t]
        alone = [
            j for j in mine if sum(float(unit[j] @ unit[i]) > similar for i in mine if i != j) <= partners * len(mine)
        ]
        n = len(mine) if t == 0 and tiles.max() > 0 else max(least, round(len(alone) / len(mine) * len(mine)))
        first = set()
        for row in (deep, middle):
            low, high = np.percentile([row[j] for j in mine], [25, 75])
            first |= {j for j in mine if row[j] > high + 1.5 * (high - low)}
        ranked = sorted(first, key=lambda j: (-deep[j], j)) + sorted(set(mine) - first, key=lambda j: (-middle[j], j))
        kept += ranked[:n]
    return sorted(kept)


def _is_the_card(reduce):
    for seed in range(6):
        for layout in (Layout.grid(7, 6), TILED):
            n = layout.n_content
            deep, middle = (
                torch.randn(1, n, generator=torch.Generator().manual_seed(s)).exp() for s in (seed, seed + 9)
            )
            keys = tokens(seed, n, 8) * 0.5 + tokens(99, 4, 8)[:, torch.arange(n) * 4 // n]
            for settings in ({}, {"similar": 0.7, "partners": 0.1, "least": 3}):
                found = ids(reduce(_view(keys, deep, middle, layout), settings))
                assert found == _naive(keys[0], deep[0].tolist(), middle[0].tolist(), layout, **settings)


@pytest.mark.system("token-correlation-compression", "exact")
def test_equals_the_card_written_naively():
    _is_the_card(lambda view, settings: Compression(**settings).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_card_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_card(lambda view, settings: stub(view, 20))


@pytest.mark.system("token-correlation-compression", "exact")
def test_a_blank_picture_keeps_the_least_and_one_without_repetition_all():
    layout = Layout.grid(8, 9)
    rows = scores(0, 72), scores(1, 72)
    assert Compression().reduce(_view(_keys(0, 72, ()), *rows, layout)).m == 1
    assert Compression(least=5).reduce(_view(_keys(0, 72, ()), *rows, layout)).m == 5
    assert Compression().reduce(_view(_keys(0, 72), *rows, layout)).m == 72


@pytest.mark.system("token-correlation-compression", "exact")
def test_blank_margin_never_raises_the_count_of_a_text_crop():
    text = tokens(0, 40, 64)
    counts = []
    for margin in (0, 8, 40, 200):
        keys = torch.cat([text, torch.ones(1, margin, 64)], 1)
        n = keys.shape[1]
        counts.append(Compression().reduce(_view(keys, scores(0, n), scores(1, n), Layout.grid(1, n))).m)
    assert counts == [40, 40, 40, 40]


@pytest.mark.system("token-correlation-compression", "exact")
def test_crops_keep_what_they_have_and_the_thumbnail_stays_whole():
    text = [
        25 + 3,
        25 + 4,
        75 + 1,
        *range(100, 125),
    ]  # two tokens of the first crop, one of the third, all of the fourth
    different = [i for i, cell in enumerate(TILED.cell[TILED.content]) if cell in text]
    keys = _keys(0, 175, different)
    found = ids(Compression().reduce(_view(keys, scores(0, 175), scores(1, 175), TILED)))
    assert np.bincount(TILED.tiles[found]).tolist() == [25, 2, 1, 1, 25, 1, 1]
    found = ids(Compression(keep=60).reduce(_view(keys, scores(0, 175), scores(1, 175), TILED)))
    assert len(found) == 60
    assert np.bincount(TILED.tiles[found])[[0, 4]].tolist() == [25, 25]


@pytest.mark.system("token-correlation-compression", "exact")
def test_outliers_of_either_block_come_first_by_the_deep_one():
    layout, n = Layout.grid(4, 10), 40
    deep, middle = scores(0, n), scores(1, n)
    deep[0, [5, 30]] = torch.tensor([9.0, 8.0])
    middle[0, [5, 17]] = 9.0
    view = _view(_keys(0, n), deep, middle, layout)
    assert ids(Compression(keep=2).reduce(view)) == [5, 30]
    assert ids(Compression(keep=3).reduce(view)) == [5, 17, 30]
    rest = [j for j in middle[0].argsort(descending=True).tolist() if j not in (5, 17, 30)]
    assert ids(Compression(keep=9).reduce(view)) == sorted([5, 17, 30, *rest[:6]])


def test_the_rest_can_be_sampled_in_proportion_to_the_middle_block():
    layout, n = Layout.grid(1, 4), 4
    middle, taken = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), np.zeros(n)
    shown = _view(_keys(0, n), torch.ones(1, n), middle, layout)
    for seed in range(150):
        view = replace(shown, seed=seed)
        taken[ids(Compression(keep=1, fill="sample").reduce(view))] += 1
    assert abs(taken / 150 - middle[0].numpy() / 10).max() < 0.1
    assert ids(Compression(keep=1, fill="sample").reduce(view)) == ids(Compression(keep=1, fill="sample").reduce(view))


def test_a_broken_token_counts_for_nothing():
    n = 30
    keys, deep, middle = _keys(0, n), scores(0, n), scores(1, n)
    keys[0, 3], deep[0, 4], middle[0, 5] = torch.nan, torch.nan, torch.nan
    view = _view(keys, deep, middle, Layout.grid(5, 6))
    assert not {3, 4, 5} & set(ids(Compression(keep=27).reduce(view)))
    assert int(view.notes["nan_scores"]) == 3
    assert Compression().reduce(view).m == 29  # the key that is broken; the others repeat nothing


def test_ties_go_to_the_lowest_index():
    flat = torch.ones(1, 30)
    assert ids(Compression(keep=7).reduce(_view(_keys(0, 30), flat, flat, Layout.grid(5, 6)))) == list(range(7))


def test_half_precision_and_ragged_batches():
    n, layout = 175, TILED
    keys = torch.cat([_keys(seed, n, range(40 * seed, 175)) for seed in range(3)]).bfloat16()
    deep, middle = scores(0, n, b=3).bfloat16(), scores(1, n, b=3).bfloat16()
    both = Compression().reduce(_view(keys, deep, middle, layout))
    assert len(set(both.counts)) == 3
    for lane in range(3):
        own = (x[lane : lane + 1].float() for x in (keys, deep, middle))
        assert ids(both, lane) == ids(Compression().reduce(_view(*own, layout)))


def test_frames_are_crops_of_which_none_is_a_thumbnail():
    layout = Layout.grid(4, 5, 3)
    assert Compression().reduce(_view(_keys(0, 60, ()), scores(0, 60), scores(1, 60), layout)).m == 1


def test_settings_and_the_default_block():
    for wrong in ({"least": 0}, {"similar": 2}, {"fill": "all"}):
        with pytest.raises(WinnowError, match=next(iter(wrong))):
            Compression(**wrong)
    (step,) = Compression().checked_steps(ModelInfo(vision_depth=24, feature_layer=-2))
    assert step.needs == (VisionKeys(22), VisionAttention(22), VisionAttention(11))
    (step,) = Compression().checked_steps(ModelInfo(vision_depth=1, has_cls=False))
    assert step.needs[2] == VisionAttention(0, query="all")


def _page(seed):
    """Six crops; half of the tokens of two are text. Paper repeats itself; attention prefers text a little."""
    generator = torch.Generator().manual_seed(seed)
    with_text = 1 + torch.randperm(6, generator=generator)[:2]
    tile = torch.from_numpy(TILED.tiles)
    text = torch.isin(tile, with_text) & (torch.rand(175, generator=generator) < 0.5)
    keys = torch.where(text[:, None], torch.randn(175, 64, generator=generator), torch.ones(64))
    keys = keys + 0.1 * torch.randn(175, 64, generator=generator)
    deep, middle = (torch.rand(1, 175, generator=generator) + 0.3 * text for _ in range(2))
    return _view(keys[None], deep, middle, TILED), text, tile > 0, torch.isin(tile, with_text)


def _finds_text(select):
    """Of what is kept of crops, 80 % lie in those with text; more text is kept than at equal shares."""
    for seed in range(8):
        view, text, crops, with_text = _page(seed)
        own = Compression().reduce(view)
        found, equal = (
            r.kept[0] & crops for r in (select(view, own.m), _equally(view, int((own.kept[0] & crops).sum())))
        )
        assert (found & with_text).sum() >= 0.8 * found.sum()
        assert (found & text).sum() > (equal & text).sum()


def _equally(view, k):
    """As many tokens of each crop, by the same attention."""
    kept = [torch.arange(25)]
    for t in range(1, 7):
        mine = torch.from_numpy(np.flatnonzero(TILED.tiles == t))
        kept.append(mine[view[DEEP][0, mine].topk(k // 6).indices])
    return Reduction.select(torch.cat(kept).sort().values[None], view.n)


@pytest.mark.system("token-correlation-compression", "directional")
def test_what_is_kept_lies_where_text_is():
    _finds_text(lambda view, k: Compression().reduce(view))


@pytest.mark.parametrize("stub", [first_k, uniform, _equally])
def test_a_stub_does_not_find_text(stub):
    with pytest.raises(AssertionError):
        _finds_text(stub)


def _shown(view):
    """A view of the sample with the middle block under the name that the method has for it."""
    return replace(view, signals={**view.signals, VisionAttention(2, query="auto"): view[VisionAttention(2)]})


def _best(view, k):
    return Compression(keep=k, local_layer=2).reduce(_shown(view))


def _finds_evidence(sample, select):
    more = gap(sample.recall(sample.kept(select, 32)), sample.recall(sample.kept(at_random, 32)))
    assert more.low > 0


@pytest.mark.system("token-correlation-compression", "directional")
@pytest.mark.xdist_group("samples")
def test_it_keeps_evidence_and_more_of_pictures_with_more_in_them(sample):
    _finds_evidence(sample, _best)
    own = torch.cat([Compression(local_layer=2).reduce(_shown(view)).kept for view in sample.views["projected"]])
    counts = own.sum(1)
    assert np.corrcoef(counts.numpy(), sample.objects.sum(1).numpy())[0, 1] > 0.4
    blind = torch.stack([at_random(view, int(k)).kept[lane] for view, lane, k in _each(sample, counts)])
    more = gap(sample.recall(own), sample.recall(blind))
    assert more.low > 0.1


def _each(sample, counts):
    lanes = [(view, lane) for view in sample.views["projected"] for lane in range(view.b)]
    return [(view, lane, k) for (view, lane), k in zip(lanes, counts, strict=True)]


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, uniform, at_random])
def test_a_stub_finds_no_evidence(sample, stub):
    with pytest.raises(AssertionError):
        _finds_evidence(sample, stub)
