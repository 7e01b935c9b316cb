"""Token Transforming by its card: all patches are mixed into those that are kept; pruning and merging are limits."""

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
from winnow.methods.token_transforming import TokenTransforming
from winnow.parts.cosine import unit
from winnow.parts.merge import weights_by_size
from winnow.parts.transform import restored, shares
from winnow.signals.vision import VisionAttention, VisionKeys

from .stubs import STUBS, scores, tokens

ROW, KEYS = VisionAttention(query="auto"), VisionKeys()
GRID = Layout.grid(5, 6, cls=True)


def _view(seed=0, layout=GRID, b=1):
    signals = {ROW: scores(seed, layout.n, b), KEYS: tokens(seed + 1, layout.n, 8, b)}
    return View.of(tokens(seed, layout.n, 12, b), signals, layout=layout)


def _stage(view, state, keep, **settings):
    method = TokenTransforming(**settings)
    return method.stage(ROW, KEYS, method.replace(ratios=(keep,)).ratios[0], view, state)


def _naive(view, mass, keep, tau, anchor, cls):
    """One item token by token: rows and masses."""
    score, unit_keys = view[ROW][0].tolist(), normalize(view[KEYS][0].double(), dim=-1)
    patches = sorted(sorted(range(cls, view.n), key=lambda j: -score[j])[:keep])
    rows, masses = [view.tokens[0, 0]] * cls, [mass[0]] * cls
    given = {i: {} for i in patches}
    for j in range(cls, view.n):
        like = torch.stack([unit_keys[i] @ unit_keys[j] for i in patches]) / tau
        share = like.softmax(0).tolist()
        for i, s in zip(patches, share, strict=True):
            given[i][j] = mass[j] * (float(i == j) if anchor and j in patches else s)
    for i in patches:
        rows.append(sum(w * view.tokens[0, j] for j, w in given[i].items()) / sum(given[i].values()))
        masses.append(sum(given[i].values()))
    return torch.stack(rows), masses, [*range(cls), *patches]


def _is_the_card(act):
    """Two stages in a row, so that masses matter."""
    for layout, cls in ((GRID, 1), (Layout.grid(4, 7), 0)):
        for anchor in (True, False):
            for tau in (0.1, 0.5):
                view, state, mass = _view(3, layout), State(), [1.0] * layout.n
                for keep in (14, 5):
                    action, state = act(view, state, keep, tau=tau, anchor=anchor)
                    rows, mass, kept = _naive(view, mass, keep, tau, anchor, cls)
                    x = action.reduction.apply(view.tokens)
                    torch.testing.assert_close(x[0], rows, rtol=1e-4, atol=1e-5)
                    assert action.reduction.representatives[0].tolist() == kept
                    torch.testing.assert_close(action.log_bias[0].exp(), torch.tensor(mass))
                    state = State({name: value[:, kept] for name, value in state.token.items()})
                    assert state.token["mass"].sum().item() == pytest.approx(layout.n, rel=1e-5)
                    signals = {ROW: scores(9, x.shape[1]), KEYS: tokens(9, x.shape[1], 8)}
                    view = View(x, layout, view.ids[:, kept], layout.n_content, signals)


@pytest.mark.system("token-transforming", "exact")
def test_equals_the_card_written_naively():
    _is_the_card(_stage)


@pytest.mark.parametrize("stub", STUBS)
def test_the_card_fails_for_a_stub(stub):
    def blind(view, state, keep, **settings):
        reduction = stub(view, keep + 1)
        return Reduce(reduction, log_bias=torch.zeros(1, reduction.m)), State({"mass": torch.ones(1, view.n)})

    with pytest.raises(AssertionError):
        _is_the_card(blind)


@pytest.mark.system("token-transforming", "exact")
@pytest.mark.parametrize("form", ["transform", "merge"])
def test_outputs_are_means_and_mass_is_conserved(form):
    for keep in (1, 7, 29):
        action, state = _stage(_view(keep, b=2), State(), keep, form=form)
        assert action.reduction.is_stochastic
        assert action.reduction.m == keep + 1
        torch.testing.assert_close(action.log_bias.exp().sum(1), torch.full((2,), 31.0))
        kept = state.token["mass"].gather(1, action.reduction.representatives)
        torch.testing.assert_close(kept, action.log_bias.exp())
        assert (action.reduction.to_matrix()[:, 0, 1:] == 0).all()
        assert (action.reduction.to_matrix()[:, 1:, 0] == 0).all()


@pytest.mark.system("token-transforming", "exact")
def test_pruning_is_a_selection_of_the_best():
    view = _view(4)
    kept = [0, *(view[ROW][0, 1:].topk(9).indices.sort().values + 1).tolist()]
    action, state = _stage(view, State(), 9, form="prune")
    assert action.reduction.is_selection
    assert action.reduction.index[0].tolist() == kept
    assert (action.log_bias, state) == (None, State())


@pytest.mark.system("token-transforming", "exact")
def test_merging_has_the_bits_of_clusters_weighted_by_size():
    view, mass = _view(5), scores(7, 31) + 0.5
    action, _ = _stage(view, State({"mass": mass}), 9, form="merge")
    kept = action.reduction.representatives[0]
    (x,), _ = unit(view[KEYS])
    owner = (x[kept[1:]] @ x.T).argmax(0) + 1
    owner[kept], owner[0] = torch.arange(10), 0
    weight, total = weights_by_size(owner[None], mass, 10)
    want = Reduction.assign(owner[None], weight, m=10)
    assert torch.equal(action.reduction.apply(view.tokens), want.apply(view.tokens))
    assert torch.equal(action.log_bias, total.log())
    soft, _ = _stage(view, State({"mass": mass}), 9, tau=0.001)
    torch.testing.assert_close(soft.reduction.apply(view.tokens), want.apply(view.tokens), atol=1e-3, rtol=1e-3)


@pytest.mark.system("token-transforming", "exact")
def test_where_all_are_kept_nothing_changes():
    for keep in (30, 99):
        action, state = _stage(_view(), State(), keep)
        assert torch.equal(action.reduction.index, torch.arange(31)[None])
        assert (action.log_bias, state) == (None, State())


def test_over_smoothing_grows_with_tau():
    """Towards many equal shares all outputs become alike."""
    view = _view(1)
    spread = [
        _stage(view, State(), 10, tau=tau, anchor=False)[0].reduction.apply(view.tokens)[0, 1:].var(0).mean().item()
        for tau in (0.01, 0.1, 1.0, 10.0)
    ]
    assert spread == sorted(spread, reverse=True)
    assert spread[0] > 10 * spread[-1]


@pytest.mark.parametrize(
    ("info", "blocks"),
    [
        (ModelInfo(vision_depth=12, points=("blocks.mlp",)), (3, 6, 9)),
        (ModelInfo(vision_depth=24, feature_layer=-2, points=("blocks.mlp",)), (5, 11, 17)),
        (ModelInfo(vision_depth=1, points=("blocks.mlp",)), (0,)),
        (ModelInfo(vision_depth=2, points=("blocks.mlp",), has_cls=False), (0, 1)),
    ],
    ids=["deit", "clip-l", "one block", "two blocks"],
)
def test_default_stages(info, blocks):
    method, steps = TokenTransforming().bind(info)
    assert method.blocks == blocks
    assert [str(step.at) for step in steps] == [f"blocks[{block}].mlp" for block in blocks]
    assert {step.needs[0].query for step in steps} == {"cls" if info.has_cls else "all"}
    assert method.ratios[-1] == TokenTransforming().ratios[-1]


def test_at_a_budget_the_last_stage_leaves_it():
    assert [r.of(576) for r in TokenTransforming().at_budget(64, 576).ratios] == [277, 133, 64]
    assert [r.of(256) for r in TokenTransforming().at_budget("34.3%", 256).ratios] == [179, 125, 88]
    assert TokenTransforming().at_budget("100%", 10) == TokenTransforming(ratios=("100.00000000%",) * 3)


def test_broken_tokens_are_not_kept_and_take_nothing():
    view = _view(2)
    view[KEYS][0, 3], view[ROW][0, 8] = torch.nan, torch.nan
    action, _ = _stage(view, State(), 10)
    assert int(view.notes["nan_scores"]) == 2
    assert 8 not in action.reduction.representatives[0]
    matrix = action.reduction.to_matrix()[0]
    assert matrix.isfinite().all()
    merged, _ = _stage(view, State(), 10, form="merge")
    assert merged.reduction.target[0, 3] > 0  # and not into [CLS]


def test_half_precision_is_worked_in_fp32():
    view = _view(6)
    half = {signal: x.bfloat16() for signal, x in view.signals.items()}
    low, high = (
        _stage(View.of(view.tokens, signals, layout=GRID), State(), 9)[0].reduction
        for signals in (half, {signal: x.float() for signal, x in half.items()})
    )
    assert torch.equal(low.matrix, high.matrix)
    assert low.matrix.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [{"tau": 0}, {"form": "x"}, {"ratios": ()}, {"blocks": (1, 2)}, {"blocks": (3, 2, 1)}, {"blocks": (-1, 2, 3)}],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        TokenTransforming(**settings)


def _restores(restore):
    """Tokens that lie between two kept ones come back nearer to what they were than as a copy of the nearest."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        ends = torch.randn(8, 24, generator=generator)
        part = torch.rand(60, 1, generator=generator)
        at = torch.randint(0, 8, (2, 60), generator=generator)
        x = torch.cat([ends, part * ends[at[0]] + (1 - part) * ends[at[1]]])[None]
        kept = torch.arange(8)[None]
        copies = x[:, kept[0]][:, (unit(x)[0][0][kept[0]] @ unit(x)[0][0].T).argmax(0)]
        assert (restore(x, kept) - x).norm() < 0.95 * (copies - x).norm()


@pytest.mark.system("token-transforming", "directional")
def test_restored_tokens_are_nearer_than_copies_of_the_nearest():
    _restores(lambda x, kept: restored(shares(unit(x)[0], kept, 0.1, anchor=True), x[:, kept[0]]))


@pytest.mark.parametrize("stub", ["first", "mean"])
def test_restoring_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _restores(lambda x, kept: (x[:, :1] if stub == "first" else x.mean(1, keepdim=True)).expand_as(x))
