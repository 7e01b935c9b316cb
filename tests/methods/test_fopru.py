"""FoPru by its card: single tokens or whole rows by received attention; on lines rows find more, on spots tokens do."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.methods.directional import at_random, evenly, gap
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.methods.fopru import FoPru
from winnow.signals.vision import VisionAttention
from winnow.testing import Picture

from .stubs import STUBS, first_k, ids, scores, tokens


def _view(score, layout):
    return View.of(tokens(0, layout.n_content, b=len(score)), score, layout=layout)


def _naive(score, layout, keep, strategy):
    """One item, with lists."""
    n = len(score)
    if strategy == "rank":
        count = max(1, min(n, keep if isinstance(keep, int) else int(Fraction(keep[:-1]) / 100 * n + Fraction(1, 2))))
        return sorted(sorted(range(n), key=lambda j: (-score[j], j))[:count])
    share = Fraction(min(keep, n), n) if isinstance(keep, int) else Fraction(keep[:-1]) / 100
    chosen = []
    for tile in range(max(layout.tiles) + 1):
        mine = [j for j in range(n) if layout.tiles[j] == tile]
        line = {j: tuple(layout.place[layout.content[j], :3]) for j in mine}
        lines = sorted(set(line.values()))
        total = {own: float(np.float32(sum(score[j] for j in mine if line[j] == own))) for own in lines}
        count = max(1, int(share * len(lines) + Fraction(1, 2)))
        best = sorted(lines, key=lambda own: -total[own])[:count]
        chosen += [j for j in mine if line[j] in best]
    return sorted(chosen)


LAYOUTS = (Layout.grid(7, 6), Layout.grid(3, 2, 4), Picture.tiled(4, 2, 1).lm)
BUDGETS = ("1%", "25%", "30%", "50%", 13, "100%")


def _is_the_paper(reduce, strategy):
    for seed, layout in enumerate(LAYOUTS):
        score = scores(seed, layout.n_content)
        for keep in BUDGETS:
            want = _naive(score[0].tolist(), layout, keep, strategy)
            assert ids(reduce(_view(score, layout), keep, len(want))) == want


@pytest.mark.system("fopru", "exact")
@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_equals_the_paper_written_naively(strategy):
    _is_the_paper(lambda view, keep, count: FoPru(keep=keep, strategy=strategy).reduce(view), strategy)


@pytest.mark.parametrize("strategy", ["rank", "row"])
@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub, strategy):
    with pytest.raises(AssertionError):
        _is_the_paper(lambda view, keep, count: stub(view, count), strategy)


def _keeps_whole_rows(reduce):
    score, layout = scores(3, 48), Layout.grid(6, 8)
    kept = ids(reduce(_view(score, layout), 24))
    lines = {j // 8 for j in kept}
    assert kept == [8 * line + col for line in sorted(lines) for col in range(8)]
    assert lines != {0, 1, 2}


@pytest.mark.system("fopru", "exact")
def test_rows_are_kept_whole():
    _keeps_whole_rows(lambda view, k: FoPru(keep=k, strategy="row").reduce(view))


@pytest.mark.parametrize("stub", [*STUBS, lambda view, k: FoPru(keep=k).reduce(view)])
def test_whole_rows_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _keeps_whole_rows(stub)


@pytest.mark.system("fopru", "exact")
@given(st.integers(0, 99), st.sampled_from(BUDGETS))
def test_where_scores_are_equal_along_rows_both_strategies_agree(seed, keep):
    layout = Layout.grid(8, 5)
    score = scores(seed, 8).repeat_interleave(5, 1)
    whole = ids(FoPru(keep=keep, strategy="row").reduce(_view(score, layout)))
    assert ids(FoPru(keep=len(whole)).reduce(_view(score, layout))) == whole


@pytest.mark.system("fopru", "exact")
@pytest.mark.parametrize("strategy", ["rank", "row"])
def test_all_tokens_in_raster_order_at_100_percent(strategy):
    for layout in LAYOUTS:
        view = _view(scores(1, layout.n_content, b=2), layout)
        assert ids(FoPru(keep="100%", strategy=strategy).reduce(view)) == list(range(layout.n_content))


def test_ties_of_rows_go_to_the_first():
    view = _view(torch.ones(2, 24), Layout.grid(6, 4))
    assert ids(FoPru(keep="50%", strategy="row").reduce(view), 1) == list(range(12))


def test_a_row_with_a_broken_token_is_not_kept():
    score = torch.linspace(1, 2, 24)[None]
    score[0, 22] = torch.nan
    view = _view(score, Layout.grid(6, 4))
    assert ids(FoPru(keep="50%", strategy="row").reduce(view)) == list(range(8, 20))
    assert int(view.notes["nan_scores"]) == 1


def test_half_precision_is_summed_in_fp32():
    score = scores(7, 576).bfloat16()
    layout = Layout.grid(24, 24)
    half, full = (FoPru(keep="25%", strategy="row").reduce(_view(x, layout)) for x in (score, score.float()))
    assert ids(half) == ids(full)


def test_after_an_earlier_method_rows_hold_what_is_left_of_them():
    layout = Layout.grid(4, 3)
    left = torch.tensor([[0, 2, 3, 4, 5, 9], [1, 4, 7, 9, 10, 11]])
    score = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.8], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    found = FoPru(keep="50%", strategy="row").reduce(View(tokens(0, 6, b=2), layout, left, 12, {}, score))
    assert [left[i, ids(found, i)].tolist() for i in (0, 1)] == [[0, 2, 3, 4, 5], [7, 9, 10, 11]]


def test_a_batch_is_its_items():
    layout = Picture.tiled(4, 2, 1).lm
    score = scores(5, layout.n_content, b=3)
    method = FoPru(keep="40%", strategy="row")
    batch = method.reduce(_view(score, layout))
    assert [ids(batch, i) for i in range(3)] == [ids(method.reduce(_view(score[i : i + 1], layout))) for i in range(3)]


def test_what_it_reads():
    (step,) = FoPru().checked_steps(ModelInfo(vision_depth=24, feature_layer=-2))
    assert (str(step.at), step.needs) == ("projected", (VisionAttention(22, query="all"),))


def test_no_other_strategy():
    with pytest.raises(WinnowError, match=r"strategy='col'; allowed: rank, row"):
        FoPru(strategy="col")


def _noisy(seed, boxes):
    """Attention of a 16 × 16 grid: noise, and more of it in boxes of (row, col, height, width), which are returned."""
    generator = torch.Generator().manual_seed(seed)
    things = torch.zeros(16, 16, dtype=torch.bool)
    for row, col, height, width in boxes:
        things[row : row + height, col : col + width] = True
    return (torch.rand(16, 16, generator=generator) + 0.5 * things).flatten()[None], things.flatten()


LINES = [[(seed % 14, 1, 1, 14), (seed % 14 + 2, 1, 1, 14)] for seed in range(20)]
SPOTS = [[(seed % 3 + 5 * i, (7 * i + seed) % 14, 2, 2) for i in range(3)] for seed in range(20)]


def _recall(reduce, pictures):
    found = []
    for seed, boxes in enumerate(pictures):
        score, things = _noisy(seed, boxes)
        kept = reduce(_view(score, Layout.grid(16, 16))).kept[0]
        found.append(float((kept & things).sum() / things.sum()))
    return np.array(found)


def _suits(strategy, other, pictures):
    more = gap(_recall(strategy, pictures), _recall(other, pictures))
    assert more.low > 0


def rank(view):
    return FoPru(keep="25%").reduce(view)


def row(view):
    return FoPru(keep="25%", strategy="row").reduce(view)


@pytest.mark.system("fopru", "directional")
def test_rows_find_lines_and_tokens_find_spots():
    _suits(row, rank, LINES)
    _suits(rank, row, SPOTS)


@pytest.mark.parametrize("stub", [lambda v: first_k(v, 64), lambda v: evenly(v, 64), lambda v: at_random(v, 64)])
def test_suiting_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _suits(stub, rank, LINES)
    with pytest.raises(AssertionError):
        _suits(stub, row, SPOTS)


def _finds_evidence(sample, select):
    for k in (64, 32):
        kept = sample.kept(select, k)
        for blind in (evenly, at_random):
            more = gap(sample.recall(kept), sample.recall(sample.kept(blind, k)))
            assert more.low > 0


@pytest.mark.system("fopru", "directional")
@pytest.mark.xdist_group("samples")
def test_received_attention_finds_evidence(sample):
    _finds_evidence(sample, lambda view, k: FoPru(keep=k).reduce(view))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, evenly, at_random])
def test_finding_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _finds_evidence(sample, stub)
