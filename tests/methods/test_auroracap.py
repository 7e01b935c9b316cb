"""AuroraCap by its card: counts of its formula, conserved sizes, equal tokens first, proportional attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.step import Reduce, State
from winnow.core.view import View
from winnow.methods.auroracap import AuroraCap
from winnow.methods.tome import ToMe
from winnow.signals.vision import VisionKeys

from .stubs import STUBS, tokens
from .tower_merges import Dropped, check_answers_more_than_pruning, released, through

BIGG = ModelInfo("ViT-bigG", vision_depth=48, feature_layer=-2, points=("blocks.mlp",))
GRID = Layout.grid(6, 6, cls=True)


@pytest.mark.system("auroracap", "exact")
@pytest.mark.parametrize(("ratio", "left"), [(1.0, 729), (0.8, 588), (0.5, 400), (0.2, 165), (0.1, 118)])
def test_of_729_patches_as_many_are_left_as_the_card_says(ratio, left):
    layout = Layout.grid(27, 27, cls=True)
    found = through(AuroraCap(ratio), BIGG, layout, tokens(0, 730, 4))
    each = int(729 * (1 - ratio) / 48)
    assert [x.shape[1] for x, _, _ in found] == [730 - each * (block + 1) for block in range(47)]
    assert found[-1][0].shape[1] == 1 + left
    assert all(size.sum() == 730 for _, size, _ in found)


@pytest.mark.system("auroracap", "exact")
@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.29, 0.31, 0.77, 0.99])
@pytest.mark.parametrize("layout", [GRID, Layout.grid(5, 7)], ids=["cls", "no cls"])
def test_the_count_for_any_ratio(ratio, layout):
    info, cls = ModelInfo(vision_depth=6, points=("blocks.mlp",)), layout.n - layout.n_content
    left = layout.n
    for x, size, _ in through(AuroraCap(ratio), info, layout, tokens(1, layout.n, 4)):
        left -= min((left - cls) // 2, int(layout.n_content * (1 - ratio) / 6))
        assert (x.shape[1], size.sum()) == (left, layout.n)


@pytest.mark.system("auroracap", "exact")
@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.1])
def test_as_released_the_matching_is_that_of_the_code(ratio):
    """Means by size, in the order of the code, block after block."""
    x = tokens(2, GRID.n, 12)
    want, size = x[0].double(), torch.ones(GRID.n, dtype=torch.float64)
    info = ModelInfo(vision_depth=5, points=("blocks.mlp",))
    for made, _, bias in through(AuroraCap.as_released(ratio=ratio), info, GRID, x):
        groups = released(want, min(int(36 * (1 - ratio) / 5), (len(want) - 1) // 2), True)
        want = torch.stack([(want[own] * size[own, None]).sum(0) / size[own].sum() for own in groups])
        size = torch.stack([size[own].sum() for own in groups])
        torch.testing.assert_close(made[0].double(), want, rtol=1e-4, atol=1e-5)
        assert bias is None or torch.allclose(bias[0].double(), size.log())


@pytest.mark.system("auroracap", "exact")
def test_at_ratio_one_nothing_changes():
    x = tokens(3, GRID.n, 8)
    for made, _, bias in through(AuroraCap(1.0), BIGG, GRID, x):
        assert torch.equal(made, x)
        assert bias is None


def _halves_stay_apart(act=None):
    """A picture of two flat halves at ratio 0.5: every token that is left is of one half."""
    halves = torch.tensor([[1.0, 0, 0], [0, 1, 0]])[GRID.place[1:, 3] // 3]
    x = torch.cat([torch.tensor([[0.0, 0, 1]]), halves])[None]
    made = through(AuroraCap(0.5), ModelInfo(vision_depth=6, points=("blocks.mlp",)), GRID, x, act=act)[-1].x[0]
    assert len(made) == 37 - 6 * 3
    assert ((made == 0) | (made == 1)).all()


@pytest.mark.system("auroracap", "exact")
def test_flat_halves_do_not_mix():
    _halves_stay_apart()


def test_flat_halves_mix_for_a_stub():
    def blind(view, state):
        """Merges in equal steps whatever is there."""
        cluster = (torch.arange(view.n) * (view.n - 3)).div(view.n, rounding_mode="floor")
        size = torch.zeros(view.n - 3).scatter_add_(0, cluster, torch.ones(view.n))
        reduction = Reduction.assign(cluster[None], (1 / size)[cluster][None], m=view.n - 3)
        return Reduce(reduction), State()

    with pytest.raises(AssertionError):
        _halves_stay_apart(blind)


def _attended(q, x, bias):
    return (normalize(q, dim=-1) @ x.mT + bias).softmax(-1) @ x


def _merging_equals_changes_nothing(weigh):
    """Of equal tokens one is left; attention to all tokens is what it was."""
    x = tokens(4, GRID.n, 8)
    for even, odd in ((4, 9), (12, 3), (20, 21)):
        x[0, even] = x[0, odd]
    q, view = tokens(5, 7, 8), View.of(x, {VisionKeys(): x}, layout=GRID)
    action = ToMe(3).merge(view, State(), VisionKeys(), 3)[0]
    one = AuroraCap(1 - 3 / 36 - 1e-6)
    assert torch.equal(one.reduce(view).target, action.reduction.target)
    (step,) = one.bind(ModelInfo(vision_depth=1, points=("blocks.mlp",)))[1]
    bias = step.act(replace(view, signals=step.signals(lambda signal: x)), State())[0].log_bias
    torch.testing.assert_close(
        _attended(q, action.reduction.apply(x), weigh(bias)[:, None]), _attended(q, x, 0), rtol=0, atol=1e-5
    )


@pytest.mark.system("auroracap", "exact")
def test_merged_equal_tokens_weigh_as_all_of_them():
    _merging_equals_changes_nothing(lambda bias: bias)
    with pytest.raises(AssertionError):
        _merging_equals_changes_nothing(torch.zeros_like)


@pytest.mark.parametrize("stub", STUBS)
def test_the_code_is_not_a_selection_that_looks_at_nothing(stub):
    view = View.of(tokens(2, GRID.n, 12), layout=GRID)
    groups = released(view.tokens[0], 9, True)
    assert stub(view, 28).index[0].tolist() != [own[0] for own in groups]


@pytest.mark.parametrize("budget", [36, 30, 9, 3, "50%", 0.25])
def test_at_a_budget_that_many_patches_are_left(budget):
    method = AuroraCap().at_budget(budget, 36)
    made = through(method, ModelInfo(vision_depth=6, feature_layer=-2, points=("blocks.mlp",)), GRID, tokens(6, 37, 4))
    assert made[-1][0].shape[1] == 1 + {"50%": 18, 0.25: 9}.get(budget, budget)


def test_a_budget_that_halving_cannot_reach_is_refused():
    with pytest.raises(WinnowError, match="auroracap: left=5 of 36; allowed in 2 blocks: 9 and more"):
        through(AuroraCap(left=5), ModelInfo(vision_depth=2, points=("blocks.mlp",)), GRID, tokens(0, 37, 4))


@pytest.mark.parametrize("settings", [{"ratio": 1.1}, {"ratio": -0.1}, {"ratio": "most"}, {"left": 0}])
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        AuroraCap(**settings)


@pytest.mark.system("auroracap", "directional")
@pytest.mark.xdist_group("samples")
def test_merged_frames_answer_more_than_as_many_that_random_pruning_leaves(some):
    """At ratio 0.06 of 256 patches and 6 blocks, 40 go in each of the five that count."""
    check_answers_more_than_pruning(some, AuroraCap(0.06))


@pytest.mark.xdist_group("samples")
def test_answering_fails_for_a_stub(some):
    with pytest.raises(AssertionError):
        check_answers_more_than_pruning(some, Dropped(40, seed=1))
