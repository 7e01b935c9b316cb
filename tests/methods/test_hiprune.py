"""HiPrune by its card: exact count for any α, anchors with their grid neighbours, registers for the rest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.methods.hiprune import HiPrune
from winnow.signals.vision import VisionAttention
from winnow.testing import Picture

from .stubs import STUBS, ids, scores, tokens

MIDDLE, DEEP = HiPrune().signals()


def _view(middle, deep, layout):
    return View.of(tokens(0, layout.n_content), {MIDDLE: middle, DEEP: deep}, layout=layout)


def _naive(middle, deep, layout, keep, alpha):
    """One tile of a grid, as the paper says it."""
    place = [tuple(p) for p in layout.place[layout.content].tolist()]
    anchors = sorted(range(len(middle)), key=lambda j: (-middle[j], j))[: min(round(keep * alpha / 5), keep // 5)]
    chosen = set(anchors)
    for j in anchors:
        grid, frame, row, col = place[j]
        around = [
            (grid, frame, row + 1, col),
            (grid, frame, row - 1, col),
            (grid, frame, row, col + 1),
            (grid, frame, row, col - 1),
        ]
        chosen |= {place.index(p) for p in around if p in place}
    rest = sorted((j for j in range(len(deep)) if j not in chosen), key=lambda j: (-deep[j], j))
    return sorted(chosen | set(rest[: keep - len(chosen)]))


def _is_the_paper(reduce):
    for seed in range(8):
        layout = Layout.grid(7, 6)
        middle, deep = scores(seed, 42), scores(seed + 50, 42)
        for keep, alpha in ((1, 0.1), (3, 1.0), (8, 1.0), (10, 1.0), (25, 0.4), (30, 0.1), (41, 1.0)):
            found = ids(reduce(_view(middle, deep, layout), keep, alpha))
            assert found == _naive(middle[0].tolist(), deep[0].tolist(), layout, keep, alpha)


@pytest.mark.system("hiprune", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(lambda view, keep, alpha: HiPrune(keep=keep, alpha=alpha).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(lambda view, keep, alpha: stub(view, keep))


@pytest.mark.system("hiprune", "exact")
@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
def test_count_is_exact_for_any_alpha(keep, alpha, seed):
    for picture in (Picture.grid(6, 8), Picture.tiled(4, 2, 1)):
        reduction = HiPrune(keep=keep, alpha=alpha).reduce(_view(scores(seed, 48), scores(seed + 1, 48), picture.lm))
        kept = ids(reduction)
        assert len(kept) == len(set(kept)) == min(keep, 48)


@pytest.mark.system("hiprune", "exact")
def test_alpha_zero_is_the_top_of_the_deep_block():
    middle, deep = scores(1, 48), scores(2, 48)
    kept = ids(HiPrune(keep=9, alpha=0).reduce(_view(middle, deep, Layout.grid(6, 8))))
    assert kept == deep[0].topk(9).indices.sort().values.tolist()


@pytest.mark.system("hiprune", "exact")
@pytest.mark.parametrize("picture", [Picture.grid(9, 9), Picture.tiled(6, 2, 1)], ids=lambda p: p.name)
def test_all_neighbours_of_all_anchors_are_kept(picture):
    layout, n = picture.lm, picture.lm.n_content
    for seed in range(5):
        middle, keep = scores(seed, n), 60
        kept = ids(HiPrune(keep=keep, alpha=0.5).reduce(_view(middle, scores(seed + 9, n), layout)))
        place, tile = layout.place[layout.content], layout.tiles
        for t in range(tile.max() + 1):
            mine = [j for j in range(n) if tile[j] == t]
            quota = keep // (tile.max() + 1)
            for a in sorted(mine, key=lambda j: -middle[0, j])[: round(quota * 0.1)]:
                near = [j for j in mine if abs(place[j] - place[a]).sum() <= 1]
                assert len(near) >= 3
                assert set(near) <= set(kept)


def test_wrap_runs_over_row_ends_as_the_released_code_does():
    middle, deep = torch.zeros(1, 20), torch.linspace(1, 0.1, 20)[None]
    middle[0, 9] = 1  # the last of row 1 of 4 × 5
    settings = {"keep": 5, "alpha": 1.0}
    layout = Layout.grid(4, 5)
    assert ids(HiPrune(**settings).reduce(_view(middle, deep, layout))) == [0, 4, 8, 9, 14]
    assert ids(HiPrune(**settings, wrap=True).reduce(_view(middle, deep, layout))) == [4, 8, 9, 10, 14]


def test_a_neighbour_without_a_score_is_not_kept():
    middle, deep = torch.zeros(1, 20), torch.linspace(1, 0.1, 20)[None]
    middle[0, 12] = 1  # its neighbours on 4 × 5 are 7, 11, 13, 17
    deep[0, 13] = torch.nan
    view = _view(middle, deep, Layout.grid(4, 5))
    assert ids(HiPrune(keep=5, alpha=1.0).reduce(view)) == [0, 7, 11, 12, 17]
    assert int(view.notes["nan_scores"]) == 1


def test_tiles_share_the_budget_equally():
    layout = Picture.tiled(4, 2, 2).lm
    kept = ids(HiPrune(keep=42).reduce(_view(scores(0, 80), scores(1, 80), layout)))
    assert torch.bincount(torch.tensor(layout.tiles[kept])).tolist() == [9, 9, 8, 8, 8]


def test_after_an_earlier_method_only_what_is_left_is_kept():
    layout = Layout.grid(6, 6)
    left = torch.tensor([[0, 1, 2, 6, 7, 8, 12, 20, 21, 35]])
    middle = torch.zeros(1, 10)
    middle[0, 4] = 1  # token 7; its neighbours 1, 6, 8 are left, 13 is not
    view = View(tokens(0, 10), layout, left, 36, {MIDDLE: middle, DEEP: torch.linspace(0, 1, 10)[None]})
    kept = left[0, ids(HiPrune(keep=5, alpha=1.0).reduce(view))].tolist()
    assert kept == [1, 6, 7, 8, 35]


@pytest.mark.parametrize(
    ("info", "block"),
    [
        (ModelInfo(vision_depth=24, feature_layer=-2), 8),
        (ModelInfo(vision_depth=32, has_cls=False, merge=2), 15),
        (ModelInfo(vision_depth=12, feature_layer=-2), 4),
        (ModelInfo(vision_depth=1), 0),
    ],
    ids=["clip-l", "qwen2.5-vl", "12 blocks", "one block"],
)
def test_default_object_block(info, block):
    (step,) = HiPrune().checked_steps(info)
    assert step.needs == (
        VisionAttention(block, query="all"),
        VisionAttention(VisionAttention().block(info), query="all"),
    )
