"""SparseVLM by its card: relevant words rate, tokens are cut in three layers, the best of the dropped are merged."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.methods.directional import blind_cuts, evenly, gap
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import Reduce, State
from winnow.core.view import View
from winnow.methods.sparsevlm import SparseVLM
from winnow.parts.density_peaks import density_peaks_naive
from winnow.signals.words import TextRaters, WordAttention
from winnow.testing import Picture

from .stubs import STUBS, ids, tokens

LLAMA = ModelInfo(model="Llama", depth=32)
TABLES = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
RATERS, WORDS = TextRaters(0), WordAttention(2)
PLAIN = SparseVLM(recycle=0)


def _view(attention, raters, x=None, **more):
    x = tokens(0, attention.shape[1]) if x is None else x
    return View.of(x, {RATERS: raters, WORDS: attention}, **more)


def _cut(view, k, method=PLAIN):
    return method.cut(view, RATERS, WORDS, method.replace(counts=(k, k, k)).counts[0])


def _words(seed, n, t=7):
    return torch.rand(1, n, t, generator=torch.Generator().manual_seed(seed))


def _released(x, attention, raters, keep):
    """The released code for one picture, over lists: rows kept, and the sources of each cluster, its centre first."""
    n = len(x)
    rating = [sum(a for a, r in zip(row, raters, strict=True) if r) / sum(raters) for row in attention]
    ranked = sorted(range(n), key=lambda j: -rating[j])
    k = min(keep, n - 1)
    merged = int((n - k) * 0.3) + 1
    others, clusters = ranked[k : k + merged], int(merged / 10) + 1
    centres, owner = density_peaks_naive([x[j] for j in others], clusters)
    groups = [[others[c], *(j for j, o in zip(others, owner, strict=True) if o == number and j != others[c])]
              for number, c in enumerate(centres)]  # fmt: skip
    return sorted(ranked[:k]), groups


def _chain(method, x, attention, raters):
    """Rows after each cut; words attend to token j with `attention[layer][:, j]`, to merged ones as to their centre."""
    held, rows, found = torch.arange(x.shape[1])[None], x, []
    for step in method.bind(LLAMA)[1]:
        values = {s: raters if isinstance(s, TextRaters) else attention[s.layer][:, held[0]] for s in step.needs}
        action = step.act(View(rows, Layout.grid(1, x.shape[1]), held, x.shape[1], values), State())[0]
        rows = action.reduction.apply(rows)
        held = held.gather(1, action.reduction.representatives)
        found.append((held[0].tolist(), rows))
    return found


@pytest.mark.system("sparsevlm", "exact")
@pytest.mark.parametrize("average", TABLES)
def test_released_code_written_naively(average):
    """The published tables: what is kept, and behind it clusters on top, each the mean of its sources."""
    x = tokens(average, 576, 6)
    attention, raters = {layer: _words(layer, 576) for layer in (2, 6, 15)}, torch.tensor([[1.0, 0, 1, 0, 0, 1, 0]])
    method = Plan.of(f"sparsevlm:released,counts={list(TABLES[average])}".replace(" ", "")).methods[0]
    found = _chain(method, x, attention, raters)
    held, rows = list(range(576)), x[0].double()
    for layer, keep, (own, made) in zip((2, 6, 15), TABLES[average], found, strict=True):
        kept, groups = _released(
            rows.tolist(), attention[layer][0, held].double().tolist(), raters[0].bool().tolist(), keep
        )
        rows = torch.cat([rows[kept], *(rows[group].mean(0, keepdim=True) for group in groups)])
        held = [held[j] for j in kept] + [held[group[0]] for group in groups]
        assert len(held) == keep + len(groups)
        assert own == held
        torch.testing.assert_close(made[0].double(), rows, rtol=1e-4, atol=1e-5)


@pytest.mark.system("sparsevlm", "exact")
def test_the_released_table_is_the_one_for_192():
    released = Plan.of("sparsevlm:released")
    assert released.methods[0].split(released.methods[0].counts[0], 576, 576) == (300, 83, 9)
    assert (released.positions, [c.of(576) for c in released.methods[0].counts]) == ("compact", [300, 200, 110])
    assert [c.of(576) for c in SparseVLM().counts] == [300, 200, 110]


def _is_rated(reduce):
    for seed in range(5):
        attention, raters = _words(seed, 40), torch.tensor([[0, 1.0, 1, 0, 0, 0, 1]])
        rating = attention[0, :, [1, 2, 6]].mean(1)
        assert ids(reduce(_view(attention, raters), 9)) == rating.topk(9).indices.sort().values.tolist()


@pytest.mark.system("sparsevlm", "exact")
def test_without_merging_the_best_rated_are_kept():
    _is_rated(_cut)


def _all_words(view, k):
    every = View.of(view.tokens, {RATERS: torch.ones_like(view[RATERS]), WORDS: view[WORDS]})
    return _cut(every, k)


@pytest.mark.parametrize("stub", [*STUBS, _all_words], ids=["first", "uniform", "all words"])
def test_rated_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_rated(stub)


@pytest.mark.system("sparsevlm", "exact")
def test_a_picture_that_no_word_rates_is_rated_by_all():
    attention = _words(0, 30)
    none = _cut(_view(attention, torch.zeros(1, 7)), 8)
    assert ids(none) == ids(_cut(_view(attention, torch.ones(1, 7)), 8))


@pytest.mark.system("sparsevlm", "exact")
@pytest.mark.parametrize("n", [576, 100, 30, 7, 2, 1])
def test_clusters_are_among_the_counts(n):
    for budget in ("52.1%", "19.1%", 5, "100%"):
        method = SparseVLM(counts=(budget,) * 3)
        reduction = method.cut(_view(_words(0, n), torch.ones(1, 7)), RATERS, WORDS, method.counts[0])
        total = method.counts[0].of(n)
        assert reduction.m == total
        kept, merged, clusters = method.split(method.counts[0], n, n)
        assert kept + clusters == total
        assert reduction.is_selection == (clusters == 0)
        if clusters:
            assert merged == int((n - kept) * 0.3) + 1
            assert clusters == merged // 10 + 1
            assert reduction.is_stochastic
            assert (reduction.to_matrix()[0, :kept].sum(1) == 1).all()
            assert int((reduction.to_matrix()[0, kept:] > 0).sum()) == merged


def test_newlines_go_where_tokens_are_merged():
    layout = Picture.tiled(4, 2, 1).lm
    for recycle, separators in ((0.3, "drop"), (0, "keep")):
        (step, *_) = SparseVLM(recycle=recycle).bind(LLAMA)[1]
        view = View.of(
            tokens(0, 48), dict(zip(step.needs, (torch.ones(1, 7), _words(0, 48)), strict=True)), layout=layout
        )
        action = step.act(view, State())[0]
        assert isinstance(action, Reduce)
        assert action.separators == separators
        assert action.reduction.ordered == (separators == "keep")


def test_broken_tokens_are_neither_kept_nor_merged():
    attention, x = _words(0, 40), tokens(0, 40)
    attention[0, 3], x[0, 9], x[0, 3] = torch.nan, torch.nan, torch.nan
    attention[0, 9] = 0.01
    reduction = _cut(_view(attention, torch.ones(1, 7), x), 20, SparseVLM())
    assert reduction.m == 20
    assert reduction.apply(x.nan_to_num(1e9)).abs().max() < 1e3
    view = _view(attention, torch.ones(1, 7), x)
    _cut(view, 20)
    assert int(view.notes["nan_scores"]) == 1
    spoilt = torch.ones(1, 7)
    spoilt[0, 2] = torch.nan  # a word of which nothing is known is no rater
    assert ids(_cut(_view(_words(1, 30), spoilt), 8)) == ids(_cut(_view(_words(1, 30), spoilt.nan_to_num(0)), 8))


def test_half_precision_is_rated_in_single():
    attention = (_words(0, 200, 40) + 4).bfloat16()
    half, single = (_cut(_view(a, torch.ones(1, 40)), 30) for a in (attention, attention.float()))
    assert ids(half) == ids(single)


@pytest.mark.parametrize(("depth", "layers"), [(32, [3, 7, 16]), (28, [2, 6, 14]), (8, [1, 4]), (4, [1, 2])])
def test_cuts_at_any_depth_look_at_the_layer_before(depth, layers):
    steps = SparseVLM(suffix=True).bind(ModelInfo(depth=depth))[1]
    assert [step.at.index for step in steps] == layers
    assert [step.needs for step in steps] == [(TextRaters(0, "all"), WordAttention(k - 1, "all")) for k in layers]
    assert SparseVLM().bind(LLAMA)[1][0].needs == (TextRaters(0, "question"), WordAttention(2, "question"))


@pytest.mark.parametrize(
    "settings",
    [{"counts": (0.5,)}, {"layers": (3, 7)}, {"layers": (0, 3, 5)}, {"recycle": 1.5}, {"members": 0}, {"counts": ()}],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        SparseVLM(**settings)


@pytest.mark.parametrize("content", [256, 576, 2880])
@pytest.mark.parametrize("budget", [1, 2, 13, 192, "12.5%"])
def test_at_a_budget_exactly_that_is_left(budget, content):
    method = SparseVLM(added=True).at_budget(budget, content)
    assert Plan.of(str(Plan((method,)))).methods[0] == method
    n = content
    for count in method.counts:
        kept, _, clusters = method.split(count, n, content)
        n = kept + clusters
    assert n == (content // 8 if budget == "12.5%" else budget)


@dataclass(frozen=True)
class ByOtherWords(SparseVLM):
    """Rated by the words that are no raters."""

    slug = "by-other-words"

    @staticmethod
    def score_by(attention, raters):
        return SparseVLM.score_by(attention, 1 - raters)


def _finds_evidence_by_its_raters(sample, plan):
    """More of the evidence is left than where the other words rate; 32 of 256 tokens."""
    assert gap(sample.left(plan), sample.left(ByOtherWords().at_budget(32, 256))).low > 0


@pytest.mark.system("sparsevlm", "directional")
@pytest.mark.xdist_group("samples")
def test_raters_find_the_evidence(sample):
    _finds_evidence_by_its_raters(sample, SparseVLM().at_budget(32, 256))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [blind_cuts(evenly, (1, 4), (64, 32)), ByOtherWords().at_budget(32, 256)])
def test_finding_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _finds_evidence_by_its_raters(sample, stub)
