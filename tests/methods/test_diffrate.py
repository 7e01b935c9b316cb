"""DiffRate by its card, given its counts: rank by [CLS], prune the last, merge the next into the most similar."""

from __future__ import annotations

import pytest
import torch

from tests.methods.directional import evenly, gap, lost, over
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.step import Reduce, State
from winnow.core.view import View
from winnow.methods.diffrate import DiffRate
from winnow.signals.vision import VisionAttention
from winnow.testing import WITHOUT_CLS

from .stubs import STUBS, scores, tokens

ROW = VisionAttention()
GRID = Layout.grid(5, 6, cls=True)
INFO = ModelInfo(vision_depth=6, feature_layer=-2, points=("blocks.mlp",))


def _view(seed=0, layout=GRID, b=1, x=None, ids=None):
    x = tokens(seed, layout.n, 12, b) if x is None else x
    ids = torch.arange(layout.n).expand(b, -1) if ids is None else ids
    return View(x, layout, ids, layout.n_content, {ROW: scores(seed + 1, x.shape[1], b)})


def _code(x, size, row, pruned, merged):
    """One block of the released code at inference, its counts with [CLS]: tokens, weights, and the order."""
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + row[1:].sort(descending=True).indices])[:pruned]
    x, size = x[order], size[order]
    if merged < pruned:
        unit = x / x.norm(dim=-1, keepdim=True)
        likeness = unit[merged:] @ unit[:merged].T
        likeness[:, 0] = -torch.inf
        best, target = likeness.max(-1)
        x = x[:merged].scatter_reduce(0, target[:, None].expand(-1, x.shape[1]), x[merged:], reduce="mean")
        size = size[:merged].scatter_add(0, target, size[merged:] * best)
    return x, size, order[:merged]


SCHEDULE = ((27, 22), (20, 20), (15, 6), (2, 1))  # patches


def _is_the_code(act):
    for seed in range(4):
        state, size, view = State(), torch.ones(31), _view(seed)
        for pruned, merged in SCHEDULE:
            action, state = act(view, state, pruned, merged)
            want, size, order = _code(view.tokens[0], size, view[ROW][0], 1 + pruned, 1 + merged)
            found, at = action.reduction.apply(view.tokens), action.reduction.representatives
            assert at[0].tolist() == order.tolist()
            torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(action.log_bias[0], size.clamp_min(torch.finfo(size.dtype).tiny).log())
            state = State({name: value.gather(1, at) for name, value in state.token.items()})
            view = _view(seed + 10 * merged, x=found, ids=view.ids.gather(1, at))


def _act(view, state, pruned, merged):
    method = DiffRate.as_released(prune=(pruned,), merge=(merged,))
    return method.act(view, state, ROW, *method.counts(view, 0, 1))


@pytest.mark.system("diffrate", "exact")
def test_as_released_it_is_the_code_written_naively():
    _is_the_code(_act)


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_fails_for_a_stub(stub):
    def blind(view, state, pruned, merged):
        reduction = stub(view, 1 + merged)
        return Reduce(reduction, log_bias=torch.zeros(1, reduction.m)), State({"size": torch.ones(1, view.n)})

    with pytest.raises(AssertionError):
        _is_the_code(blind)


@pytest.mark.system("diffrate", "exact")
def test_with_all_mass_on_all_tokens_it_is_the_identity():
    for method in (DiffRate(left="100%"), DiffRate(prune=(30, "100%"), merge=(99, "100%"))):
        for _, step in enumerate(method.bind(INFO)[1]):
            view = View(tokens(0, 31, 12), GRID, torch.arange(31)[None], 30, step.signals(lambda signal: scores(1, 31)))
            action, state = step.act(view, State())
            assert torch.equal(action.reduction.index, torch.arange(31)[None])
            assert (action.log_bias, state) == (None, State())


@pytest.mark.system("diffrate", "exact")
def test_every_kept_patch_is_a_mean_and_cls_stays_alone():
    reduction = DiffRate(prune=(26,), merge=(9,)).reduce(_view(2, b=2))
    assert reduction.is_stochastic
    assert (reduction.m, (reduction.kept.sum(1) == 27).all()) == (10, True)
    assert ((reduction.to_matrix() != 0).sum(1) <= 1).all()
    assert torch.equal(reduction.to_matrix()[:, 0], torch.eye(31)[:1].expand(2, -1))


def test_pruning_alone_and_merging_alone():
    view = _view(3)
    best = [0, *(1 + view[ROW][0, 1:].argsort(descending=True)).tolist()]
    pruned = DiffRate(prune=(12,), merge=(12,)).reduce(view)
    assert pruned.representatives[0].tolist() == best[:13]
    assert torch.equal(pruned.apply(view.tokens)[0], view.tokens[0, best[:13]])
    merged = DiffRate(prune=(30,), merge=(12,)).reduce(view)
    assert merged.representatives[0].tolist() == best[:13]
    assert merged.kept.all()


def _left(method, info=INFO, layout=GRID):
    x, ids, state, left = tokens(0, layout.n, 12), torch.arange(layout.n)[None], State(), []
    for step in method.bind(info)[1]:
        shown = step.signals(lambda signal, n=x.shape[1]: scores(n, n))
        action, state = step.act(View(x, layout, ids, layout.n_content, shown), state)
        at = action.reduction.representatives
        x, ids = action.reduction.apply(x), ids.gather(1, at)
        state = State({name: value.gather(1, at) for name, value in state.token.items()})
        left.append(x.shape[1] - 1)
    return left


def test_the_uniform_schedule_takes_as_many_in_every_block_but_the_first():
    assert _left(DiffRate(left=10)) == [30, 25, 20, 15, 10]
    assert _left(DiffRate(left=1), ModelInfo(vision_depth=1, points=("blocks.mlp",))) == [1]
    assert DiffRate(left=10).counts(_view(), 1, 5) == (28, 25)
    for budget, want in ((30, 30), (8, 8), (1, 1), ("50%", 15)):
        assert _left(DiffRate(prune=(3,), merge=(2,)).at_budget(budget, 30))[-1] == want


def test_blocks_behind_a_schedule_keep_all():
    assert _left(DiffRate(prune=(25, "70%"), merge=(20, "50%"))) == [20, 15, 15, 15, 15]


def test_broken_tokens_are_not_kept():
    view = _view(2)
    view[ROW][0, 8], view.tokens[0, 3] = torch.nan, torch.nan
    reduction = DiffRate(prune=(25,), merge=(10,)).reduce(view)
    assert int(view.notes["nan_scores"]) == 2
    assert not {3, 8} & set(reduction.representatives[0].tolist())
    assert reduction.to_matrix().isfinite().all()


def test_half_precision_is_worked_in_fp32():
    x, row = tokens(0, 31, 12).bfloat16(), scores(1, 31).bfloat16()
    low, high = (
        DiffRate(prune=(25,), merge=(10,)).reduce(View.of(a, {ROW: r}, layout=GRID))
        for a, r in ((x, row), (x.float(), row.float()))
    )
    assert torch.equal(low.target, high.target)
    assert low.weight.dtype == torch.float32


def test_a_weight_that_unlike_tokens_bring_down_stays_positive():
    x = torch.ones(1, 31, 4)
    x[:, 2:] = -1
    view = View.of(x, {ROW: torch.linspace(1, 0, 31)[None]}, layout=GRID)
    method = DiffRate(prune=(30,), merge=(1,))
    action, _ = method.act(view, State(), ROW, 30, 1)
    assert action.log_bias.isfinite().all()


def test_towers_without_cls_are_refused():
    with pytest.raises(UnsupportedError, match=r"no \[CLS\]"):
        DiffRate().checked_steps(WITHOUT_CLS)


@pytest.mark.parametrize("settings", [{"prune": (3,)}, {"merge": (3,)}, {"prune": (3, 2), "merge": (3,)}, {"left": 0}])
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        DiffRate(**settings)


def _keeps_evidence_and_represents_the_rest(sample, reduce):
    """Of 256 patches, 64 that hold more evidence than even ones; what is dropped is nearer to them than if pruned."""
    views = []
    for view in sample.views["features"]:
        row = view[ROW]
        views.append(View.of(view.tokens, {ROW: torch.cat([torch.ones_like(row[:, :1]), row], 1)}, layout=view.layout))
    pruned = over(views, lambda view: lost(view, DiffRate(prune=(64,), merge=(64,)).reduce(view)))
    assert gap(over(views, lambda view: lost(view, reduce(view))), 0.9 * pruned).high < 0
    kept = torch.cat([reduce(view).representatives for view in views])[:, 1:] - 1
    kept = torch.zeros(len(kept), 256, dtype=torch.bool).scatter_(1, kept, True)
    assert gap(sample.recall(kept), sample.recall(sample.kept(evenly, 64))).low > 0


@pytest.mark.system("diffrate", "directional")
@pytest.mark.xdist_group("samples")
def test_merging_keeps_evidence_and_represents_the_rest(sample):
    _keeps_evidence_and_represents_the_rest(sample, DiffRate(prune=("100%",), merge=(64,)).reduce)


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [*STUBS, "pruning"])
def test_representing_fails_for_a_stub(sample, stub):
    blind = DiffRate(prune=(64,), merge=(64,)).reduce if stub == "pruning" else lambda view: stub(view, 65)
    with pytest.raises(AssertionError):
        _keeps_evidence_and_represents_the_rest(sample, blind)
