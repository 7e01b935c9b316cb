"""VisionZip by its card: dominant tokens, contextual tokens as target plus mean, their counts and their order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import PAD, Layout, cls_token, grid_rows
from winnow.core.reduction import Reduction
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.visionzip import VisionZip
from winnow.signals.vision import VisionAttention, VisionKeys
from winnow.testing import WITH_CLS, WITHOUT_CLS, Picture

from .stubs import scores, tokens

CLS_ROW, KEYS = VisionAttention(), VisionKeys()


def _view(layout, seed=0, b=1, x=None, entry=None):
    x = tokens(seed, layout.n, 12, b) if x is None else x
    signals = {CLS_ROW: scores(seed, layout.n_content, b), KEYS: tokens(seed + 1, layout.n, 8, b)}
    return View.of(x, signals, layout=layout, n_visual=entry)


def _naive(x, row, keys, dominant, contextual, merge="sum"):
    """One tile of one item as the paper has it: `x` [1 + N, D], `row` [N], `keys` [1 + N, h]."""
    picked = sorted(sorted(range(len(row)), key=lambda j: (-row[j], j))[: dominant - 1])
    out = [x[0]] + [x[1 + j] for j in picked]
    rest = [j for j in range(len(row)) if j not in picked]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = [rest[i * step] for i in range(contextual)]
    metric = normalize(keys[1:], dim=-1)
    members = {t: [] for t in targets}
    for j in rest:
        if contextual and j not in targets:
            members[max(targets, key=lambda t: float(metric[j] @ metric[t]))].append(j)
    for t in targets:
        others = [x[1 + j] for j in members[t]]
        if merge == "mean":
            out.append(torch.stack([x[1 + t], *others]).mean(0))
        else:
            out.append(x[1 + t] + (torch.stack(others).mean(0) if others else 0))
    return torch.stack(out)


def _is_the_paper(reduce):
    for seed in range(6):
        layout = Layout.grid(6, 7, cls=True)
        view = _view(layout, seed)
        for d, c in ((1, 0), (1, 1), (6, 0), (6, 3), (20, 10), (30, 12)):
            for merge in ("sum", "mean"):
                want = _naive(view.tokens[0], view[CLS_ROW][0].tolist(), view[KEYS][0], d, c, merge)
                found = reduce(view, d, c, merge).apply(view.tokens)[0]
                torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.system("visionzip", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(lambda view, d, c, merge: VisionZip(dominant=d, contextual=c, merge=merge).reduce(view))


def _first(view, d, c, merge):
    return Reduction.select(torch.arange(d + c)[None], view.n)


def _uniform(view, d, c, merge):
    return Reduction.select((torch.arange(d + c) * view.n // (d + c))[None], view.n)


@pytest.mark.parametrize("stub", [_first, _uniform])
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(stub)


@pytest.mark.system("visionzip", "exact")
@pytest.mark.parametrize(("keep", "dominant", "contextual"), [(192, 162, 30), (128, 108, 20), (64, 54, 10)])
def test_published_pairs(keep, dominant, contextual):
    layout = Layout.grid(24, 24, cls=True)
    assert VisionZip(keep=keep).counts((576,), 576) == ((dominant, contextual),)
    by_pair = VisionZip(dominant=dominant, contextual=contextual)
    assert by_pair.counts((576,), 576) == ((dominant, contextual),)
    view = _view(layout)
    a, b = VisionZip(keep=keep).reduce(view), by_pair.reduce(view)
    assert a.m == b.m == keep
    assert torch.equal(a.target, b.target)


def test_published_pairs_of_a_tile_count_for_each_tile():
    for dominant, contextual in ((108, 20), (54, 10), (27, 5)):
        assert (
            VisionZip(dominant=dominant, contextual=contextual).counts((576,) * 5, 2880)
            == ((dominant, contextual),) * 5
        )
    assert VisionZip(keep=320).counts((576,) * 5, 2880) == ((54, 10),) * 5


def test_small_budgets_and_small_pictures():
    assert VisionZip(keep=1).counts((9,), 9) == ((1, 0),)
    assert VisionZip(keep=100).counts((576,), 576) == ((84, 16),)  # 15.6 is nearest to 16
    assert VisionZip(keep=2).counts((9, 9, 9), 27) == ((1, 0), (1, 0), (0, 0))
    assert VisionZip(dominant=54, contextual=10).counts((9,), 9) == ((8, 1),)  # never more than there are
    for keep in range(1, 13):
        layout = Layout.grid(3, 4, cls=True)
        assert VisionZip(keep=keep, contextual=0.5).reduce(_view(layout)).m == keep


@pytest.mark.system("visionzip", "exact")
@pytest.mark.parametrize("picture", [Picture.grid(5, 6), Picture.tiled(4, 2, 2)], ids=lambda p: p.name)
def test_each_source_goes_to_exactly_one_output(picture):
    view = _view(picture.tower, b=2)
    reduction = VisionZip(keep=20, contextual=0.4).reduce(view)
    feeds = (reduction.to_matrix() != 0).sum(1)
    cls = torch.tensor(picture.tower.kind == 2)
    assert (feeds[:, ~cls] == 1).all()
    assert (feeds[:, cls] <= 1).all()


@pytest.mark.system("visionzip", "exact")
def test_without_contextual_tokens_it_is_fastervlm_and_cls():
    layout = Layout.grid(6, 7, cls=True)
    view = _view(layout)
    rows = VisionZip(keep=9, contextual=0).reduce(view).representatives[0].tolist()
    patches = FasterVLM(keep=8).reduce(View.of(view.tokens[:, 1:], view[CLS_ROW])).index[0]
    assert rows == [0, *(patches + 1).tolist()]


@pytest.mark.system("visionzip", "exact")
def test_equal_tokens_reveal_the_sum():
    layout = Layout.grid(6, 6, cls=True)
    v = tokens(9, 1, 12)[0, 0]
    x = v.expand(1, 37, 12).contiguous()
    view = _view(layout, x=x)
    summed = VisionZip(dominant=5, contextual=3).reduce(view).apply(x)[0]
    torch.testing.assert_close(summed[:5], v.expand(5, 12))
    torch.testing.assert_close(summed[5:], 2 * v.expand(3, 12))
    mean = VisionZip(dominant=5, contextual=3, merge="mean").reduce(view)
    torch.testing.assert_close(mean.apply(x)[0], v.expand(8, 12))
    assert mean.is_stochastic
    assert not VisionZip(dominant=5, contextual=3).reduce(view).is_stochastic


def test_a_target_that_nothing_joins_is_left_as_it_is():
    """The count of the mean is clamped to 1: target + 0."""
    layout = Layout.grid(1, 3, cls=True)
    view = _view(layout)
    x = view.tokens
    out = VisionZip(dominant=1, contextual=3).reduce(view).apply(x)
    assert out.shape[1] == 3
    out = VisionZip(dominant=2, contextual=2).reduce(_view(layout, entry=4)).apply(x)
    rest = [j + 1 for j in range(3) if j != int(view[CLS_ROW].argmax())]
    assert torch.equal(out[0, 2:], x[0, rest])


@pytest.mark.system("visionzip", "exact")
def test_targets_are_not_merged_into_each_other():
    """With equal keys every leftover goes to the first target; the other targets stay as they are."""
    layout = Layout.grid(3, 4, cls=True)
    view = _view(layout)
    view.signals[KEYS].fill_(1.0)
    reduction = VisionZip(dominant=1, contextual=3).reduce(view)
    assert reduction.representatives[0].tolist() == [0, 1, 5, 9]
    assert [len(reduction.lane(0).sources(j)) for j in range(4)] == [1, 10, 1, 1]


def test_order_of_a_single_tile_is_cls_patches_contextual():
    reduction = VisionZip(dominant=4, contextual=2).reduce(_view(Layout.grid(4, 5, cls=True)))
    representatives = reduction.representatives[0].tolist()
    assert representatives[0] == 0
    assert representatives[1:4] == sorted(representatives[1:4])
    assert representatives[4] < representatives[5]
    assert not reduction.ordered


@pytest.mark.system("visionzip", "exact")
def test_order_of_tiles_reads_the_mosaic_row_by_row():
    """Thumbnail ([CLS], patches); patches of all crops over the whole mosaic; their [CLS]; contextual tokens."""
    layout = Picture.tiled(2, 1, 2).tower  # 3 tiles of [CLS] + 2 × 2; the mosaic is 2 × 4
    row = torch.ones(1, 12)
    view = View.of(tokens(0, 15), {CLS_ROW: row, KEYS: tokens(1, 15)}, layout=layout)
    reduction = VisionZip(dominant=4, contextual=0).reduce(view)
    # Three patches of each tile: 1, 2, 3 of the thumbnail; 6, 7 | 11, 12 in the first mosaic row, 8 | 13 in the second.
    assert reduction.representatives[0].tolist() == [0, 1, 2, 3, 6, 7, 11, 12, 8, 13, 5, 10]
    reduction = VisionZip(dominant=2, contextual=2).reduce(view)
    assert reduction.representatives[0].tolist() == [0, 1, 6, 11, 5, 10, 2, 3, 7, 8, 12, 13]


def test_letterbox_patches_are_neither_kept_nor_merged():
    part = grid_rows(2, 3)
    part["kind"][[0, 1, 2]] = PAD
    part["place"][[0, 1, 2]] = -1
    layout = Layout.of("letterbox", [cls_token(), part])
    assert (layout.n, layout.n_content) == (7, 3)
    reduction = VisionZip(keep=3, contextual=0.34).reduce(_view(layout))
    assert reduction.kept[0].tolist() == [True, False, False, False, True, True, True]


def test_separators_are_dropped():
    (step,) = VisionZip().checked_steps(WITH_CLS)
    assert str(step.at) == "features"
    view = _view(Layout.grid(9, 9, cls=True))
    view = replace(view, signals=dict(zip(step.needs, view.signals.values(), strict=True)))
    action, _ = step.act(view, State())
    assert action.separators == "drop"


def _error(view, reduction):
    """Mean cosine distance of every patch to its nearest output."""
    out = normalize(reduction.apply(view.tokens)[0], dim=-1)
    return (1 - (normalize(view.tokens[0, 1:], dim=-1) @ out.T).amax(1)).mean().item()


def _represents_the_dropped(reduce):
    """[CLS] looks at one object; the background has structure of its own, which contextual tokens must carry."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(7, 24, generator=generator)
        member = torch.arange(144) // 24 % 6 + 1
        member[:30] = 0  # the object
        x = torch.cat([torch.zeros(1, 24), centres[member] + 0.1 * torch.randn(144, 24, generator=generator)])[None]
        row = torch.rand(1, 144, generator=generator) * 0.1 + (member == 0)
        layout = Layout.grid(12, 12, cls=True)
        view = View.of(x, {CLS_ROW: row, KEYS: x}, layout=layout)
        ranking = FasterVLM(keep=24).reduce(View.of(x[:, 1:], row)).index + 1
        assert _error(view, reduce(view)) < 0.5 * _error(view, Reduction.select(ranking, 145))


@pytest.mark.system("visionzip", "directional")
def test_at_equal_count_dropped_tokens_are_represented_better_than_by_fastervlm():
    _represents_the_dropped(lambda view: VisionZip(dominant=14, contextual=10).reduce(view))


@pytest.mark.parametrize("stub", ["first", "no contextual tokens"])
def test_representation_fails_for_a_stub(stub):
    first = lambda view: Reduction.select(torch.arange(24)[None], view.n)  # noqa: E731
    plain = lambda view: VisionZip(keep=24, contextual=0).reduce(view)  # noqa: E731
    with pytest.raises(AssertionError):
        _represents_the_dropped(first if stub == "first" else plain)


def test_towers_without_cls_are_refused():
    with pytest.raises(UnsupportedError, match=r"no \[CLS\]"):
        VisionZip().checked_steps(WITHOUT_CLS)
    with pytest.raises(WinnowError, match=r"\[CLS\]"):
        VisionZip().reduce(View.of(tokens(0, 9), {CLS_ROW: scores(0, 9), KEYS: tokens(0, 9)}, layout=Layout.grid(3, 3)))


def test_it_must_be_the_first_at_features():
    layout = Layout.grid(3, 3, cls=True)
    with pytest.raises(WinnowError, match="put it first"):
        VisionZip().reduce(View.of(tokens(0, 5), {CLS_ROW: scores(0, 4), KEYS: tokens(0, 5)}, layout=layout))


@pytest.mark.parametrize(
    "settings",
    [
        {"merge": "max"},
        {"contextual": 10},
        {"contextual": -0.1},
        {"dominant": 0, "contextual": 1},
        {"dominant": 5},
        {"contextual": "x"},
    ],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        VisionZip(**settings)


def test_weights_sum_to_two_in_a_contextual_token_and_one_in_a_dominant():
    reduction = VisionZip(dominant=5, contextual=3).reduce(_view(Layout.grid(8, 8, cls=True)))
    np.testing.assert_allclose(reduction.mass[0].numpy(), [1] * 5 + [2] * 3, atol=1e-5)


@pytest.mark.parametrize("method", [VisionZip(keep=64), VisionZip(dominant=54, contextual=10)])
def test_at_another_budget_the_shares_stay(method):
    other = method.at_budget(128, 576)
    assert other.counts((576,), 576) == ((108, 20),)
    assert VisionZip(merge="mean", order="thumbnail").at_budget(9, 576) == VisionZip(9, merge="mean", order="thumbnail")


def test_all_of_the_thumbnail_may_come_first():
    layout = Picture.tiled(2, 1, 2).tower
    view = View.of(tokens(0, 15), {CLS_ROW: torch.ones(1, 12), KEYS: tokens(1, 15)}, layout=layout)
    usual = VisionZip(dominant=2, contextual=2).reduce(view)
    other = VisionZip(dominant=2, contextual=2, order="thumbnail").reduce(view)
    assert other.representatives[0].tolist() == [0, 1, 2, 3, 6, 11, 5, 10, 7, 8, 12, 13]
    rows = dict(zip(usual.representatives[0].tolist(), usual.apply(view.tokens)[0], strict=True))
    assert all(
        torch.equal(row, rows[a])
        for a, row in zip(other.representatives[0].tolist(), other.apply(view.tokens)[0], strict=True)
    )
