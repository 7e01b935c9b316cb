"""ToMe by its card: the r best pairs of even and odd tokens, means by size, sizes that are conserved."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.step import Reduce, State
from winnow.core.view import View
from winnow.methods.tome import ToMe
from winnow.signals.vision import VisionKeys

from .stubs import STUBS, tokens
from .tower_merges import Dropped, check_answers_more_than_pruning, released, through

KEYS = VisionKeys()
GRID = Layout.grid(5, 6, cls=True)
POINTS = ("blocks.mlp",)


def _view(seed=0, layout=GRID, b=1, keys=None):
    keys = tokens(seed + 50, layout.n, 8, b) if keys is None else keys
    return View.of(tokens(seed, layout.n, 12, b), {KEYS: keys}, layout=layout)


def _pairs(reduction, lane=0):
    """Sets of tokens that become one."""
    matrix = reduction.to_matrix()[lane] != 0
    return {tuple(row.nonzero()[:, 0].tolist()) for row in matrix if row.sum() > 1}


def _reference(x, keys, size, r, cls):
    """One item as the paper has it, in lists: rows and sizes of the outputs."""
    unit = normalize(keys.double(), dim=-1)
    n = len(x)
    odd = list(range(1, n, 2))
    wish = {a: max(odd, key=lambda b: float(unit[a] @ unit[b])) for a in range(cls, n, 1) if a % 2 == 0}
    merged = sorted(wish, key=lambda a: -float(unit[a] @ unit[wish[a]]))[: min(r, (n - cls) // 2)]
    groups = [[a] for a in range(0, n, 2) if a not in merged] + [[b, *(a for a in merged if wish[a] == b)] for b in odd]
    sizes = [sum(size[i] for i in own) for own in groups]
    return torch.stack([sum(size[i] * x[i] for i in own) / s for own, s in zip(groups, sizes, strict=True)]), sizes


def _is_the_paper(act):
    """Two merges in a row, so that sizes matter."""
    for layout, cls in ((GRID, 1), (Layout.grid(4, 7), 0), (Layout.grid(3, 3, cls=True), 1)):
        for r in (1, 4, 99):
            x, size, state = tokens(r, layout.n, 12), [1.0] * layout.n, State()
            for turn in range(2):
                keys = tokens(10 * r + turn, x.shape[1], 8)
                view = View(x, layout, torch.arange(x.shape[1])[None], layout.n_content, {KEYS: keys})
                action, state = act(view, state, r)
                want, size = _reference(x[0], keys[0], size, r, cls)
                x = action.reduction.apply(x)
                torch.testing.assert_close(x[0], want, rtol=1e-5, atol=1e-5)
                feeds = (action.reduction.to_matrix() != 0).float()
                state = State(summed={name: value @ feeds[0].T for name, value in state.summed.items()})
                assert state.summed["size"][0].tolist() == size
                torch.testing.assert_close(action.log_bias[0], torch.tensor(size).log())


def _merge(view, state, r, **settings):
    method = ToMe(r, **settings)
    return method.merge(view, state, KEYS, method.pairs(view, 0, 1))


@pytest.mark.system("tome", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(_merge)


@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub):
    def blind(view, state, r):
        reduction = stub(view, view.n - min(r, (view.n - 1) // 2))
        return Reduce(reduction, log_bias=torch.zeros(1, reduction.m)), State(summed={"size": torch.ones(1, view.n)})

    with pytest.raises(AssertionError):
        _is_the_paper(blind)


@pytest.mark.system("tome", "exact")
def test_every_source_feeds_one_output_and_every_output_is_a_mean():
    for r in (1, 7, 15):
        reduction = ToMe(r).reduce(_view(r, b=2))
        assert reduction.is_stochastic
        assert ((reduction.to_matrix() != 0).sum(1) == 1).all()
        assert reduction.m == 31 - r
        assert (reduction.representatives[:, 0] == 0).all()
        assert (reduction.to_matrix()[:, 0].argmax(1) == 0).all()
    assert ToMe(99).reduce(_view()).m == 16  # no more than half of the patches


def _duplicates_merge_first(reduce):
    keys = tokens(3, GRID.n, 8)
    for even, odd in ((4, 9), (12, 3), (20, 21)):
        keys[0, even] = keys[0, odd]
    assert _pairs(reduce(_view(keys=keys), 3)) == {(4, 9), (3, 12), (20, 21)}


@pytest.mark.system("tome", "exact")
def test_duplicates_merge_first():
    _duplicates_merge_first(lambda view, r: ToMe(r).reduce(view))


def _neighbours(view, r):
    """A merge that looks at nothing: the first r patches with those behind them."""
    cluster = torch.arange(view.n) - torch.arange(view.n).div(2, rounding_mode="floor").clamp(max=r)
    return Reduction.assign(cluster[None], m=view.n - r)


def test_duplicates_fail_for_a_stub():
    with pytest.raises(AssertionError):
        _duplicates_merge_first(_neighbours)


@pytest.mark.system("tome", "exact")
def test_without_pairs_nothing_changes():
    view = _view()
    action, state = ToMe(0).merge(view, State(), KEYS, 0)
    assert torch.equal(action.reduction.index, torch.arange(31)[None])
    assert action.log_bias is None
    assert state == State()


@pytest.mark.parametrize(
    ("settings", "blocks", "want"),
    [
        ({"r": 8}, 4, [8, 8, 8, 8]),
        ({"r": 8, "inflect": -1}, 5, [16, 12, 8, 4, 0]),
        ({"r": 8, "inflect": 1}, 5, [0, 4, 8, 12, 16]),
        ({"r": 13, "inflect": 0.3}, 4, [9, 11, 14, 17]),
        ({"each": (5, 2)}, 4, [5, 2, 0, 0]),
        ({"each": (5, 2, 1)}, 2, [5, 2]),
        ({"r": 6, "inflect": -1}, 1, [12]),
    ],
)
def test_schedules(settings, blocks, want):
    assert ToMe(**settings).schedule(blocks) == want


def _through(method, info, layout, b=1):
    """How many tokens are left behind each block, with random keys."""
    found = through(method, info, layout, tokens(0, layout.n, 12, b), keys=lambda n: tokens(n, n, 8, b))
    assert all((left.size.sum(1) == layout.n).all() for left in found)
    return [left.x.shape[1] for left in found]


@pytest.mark.system("tome", "exact")
def test_sizes_are_conserved_and_r_tokens_leave_in_every_block():
    info = ModelInfo(vision_depth=6, feature_layer=-2, points=POINTS)
    assert _through(ToMe(3), info, GRID, b=2) == [28, 25, 22, 19, 16]
    assert _through(ToMe(99), info, GRID) == [16, 9, 5, 3, 2]
    assert _through(ToMe(2), info, Layout.grid(5, 6)) == [28, 26, 24, 22, 20]


@pytest.mark.parametrize("budget", [30, 29, 16, 8, 3, 2, 1, "50%", 0.25])
def test_at_a_budget_that_many_patches_are_left(budget):
    method = ToMe().at_budget(budget, 30)
    left = _through(method, ModelInfo(vision_depth=6, feature_layer=-2, points=POINTS), GRID)
    want = {"50%": 15, 0.25: 8}.get(budget, budget)
    assert left[-1] == 1 + want
    assert left == sorted(left, reverse=True)
    assert _through(method, ModelInfo(vision_depth=5, points=POINTS), Layout.grid(5, 6))[-1] == want


def test_a_budget_that_halving_cannot_reach_is_refused():
    with pytest.raises(WinnowError, match="allowed in 2 blocks: 8 and more"):
        _through(ToMe(left=5), ModelInfo(vision_depth=2, points=POINTS), GRID)


def test_a_budget_of_tiles_is_a_share_of_each():
    assert ToMe().at_budget(320, 2880).left.of(576) == 64
    assert ToMe().at_budget(13, 256).left.of(256) == 13


@pytest.mark.system("tome", "exact")
@pytest.mark.parametrize("r", [1, 8, 23, 200])
@pytest.mark.parametrize("layout", [Layout.grid(14, 14, cls=True), Layout.grid(14, 14)], ids=["cls", "no cls"])
def test_as_released_the_matching_is_that_of_the_code(layout, r):
    for seed in range(3):
        view = _view(seed, layout)
        reduction = ToMe.as_released(r=r).reduce(view)
        capped = min(r, (layout.n - (layout.n == 197)) // 2)
        want = released(view[KEYS][0], capped, layout.n == 197)
        found = [[int(rep)] for rep in reduction.representatives[0]]
        for token, owner in enumerate(reduction.target[0].tolist()):
            found[owner] += [token] if token != found[owner][0] else []
        assert found == want


def test_by_default_the_order_without_cls_is_that_of_the_picture():
    representatives = ToMe(4).reduce(_view(layout=Layout.grid(5, 6))).representatives[0].tolist()
    assert representatives == [*sorted(representatives[:11]), *range(1, 30, 2)]
    assert (
        representatives != ToMe(4, order="likeness").reduce(_view(layout=Layout.grid(5, 6))).representatives[0].tolist()
    )


def test_at_random_even_tokens_may_merge_with_each_other():
    view = _view()
    found = [ToMe(8, split=split).reduce(view) for split in ("even", "random")]
    assert all(sum(i % 2 for i in own) == 1 for own in _pairs(found[0]))
    assert any(sum(i % 2 for i in own) != 1 for own in _pairs(found[1]))
    assert all(0 not in own for own in _pairs(found[1]))
    assert found[1].is_stochastic
    assert torch.equal(found[1].target, ToMe(8, split="random").reduce(view).target)


def test_broken_keys_merge_last_and_are_counted():
    keys = tokens(3, GRID.n, 8)
    keys[0, [2, 5, 8]] = torch.nan
    view = _view(keys=keys)
    reduction = ToMe(10).reduce(view)
    assert int(view.notes["nan_scores"]) == 3
    assert not {2, 5, 8} & {i for own in _pairs(reduction) for i in own}
    assert ToMe(15).reduce(view).to_matrix().isfinite().all()


def test_half_precision_merges_what_fp32_merges():
    keys = tokens(1, GRID.n, 8).bfloat16()
    low, high = ToMe(6).reduce(_view(keys=keys)), ToMe(6).reduce(_view(keys=keys.float()))
    assert torch.equal(low.target, high.target)
    assert low.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [{"r": -1}, {"each": (3, -1)}, {"r": 0.5}, {"inflect": 2}, {"order": "x"}, {"left": 0}]
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        ToMe(**settings)


@pytest.mark.system("tome", "directional")
@pytest.mark.xdist_group("samples")
def test_merged_tokens_answer_more_than_as_many_that_random_pruning_leaves(some):
    check_answers_more_than_pruning(some, ToMe(40))


@pytest.mark.xdist_group("samples")
def test_answering_fails_for_a_stub(some):
    with pytest.raises(AssertionError):
        check_answers_more_than_pruning(some, Dropped(40, seed=1))
