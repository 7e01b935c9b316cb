"""AIM by its card: rounds of merging in each tile before the LM, then a falling share by PageRank, down to nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.directional import gap, over
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.aim import AIM
from winnow.parts.aim_merge import merge_naive
from winnow.signals.layers import PageRank
from winnow.testing import Picture

from .stubs import STUBS, ids, scores, tokens

QWEN = ModelInfo(model="Qwen2", depth=28)


def _steps(method, info=QWEN):
    return {step.at.index if step.at.index is not None else -1: step for step in method.bind(info)[1]}


def _left(method, n, info=QWEN):
    """Ids that are left before each LM layer that drops, where layer k ranks token j by `scores(k)[j]`."""
    held, found = torch.arange(n)[None], {}
    for layer, step in _steps(method, info).items():
        if layer < 0:
            continue
        rank = scores(layer - 1, n).gather(1, held)
        view = View(tokens(0, held.shape[1], 4), Layout.grid(1, n), held, n, dict.fromkeys(step.needs, rank))
        held = held.gather(1, step.act(view, State())[0].reduction.index)
        found[layer] = held[0].tolist()
    return found


@pytest.mark.system("aim", "exact")
@pytest.mark.parametrize("n", [49, 1568, 30, 3])
def test_released_dropping_written_naively(n):
    """In each layer the best of those that are left, as many as the share of all says; it holds from the next layer."""
    found = _left(AIM(rounds=0), n)
    left = list(range(n))
    retain = [max(0, 1.0 - (layer - 14 + 1) * 0.125) if layer >= 14 else 1.0 for layer in range(28)]
    for layer, share in enumerate(retain):
        rank = scores(layer, n)[0].tolist()
        left = sorted(sorted(left, key=lambda j: -rank[j])[: int(n * share)])
        if layer + 1 in found:
            assert found[layer + 1] == left
        else:
            assert share in (0, 1)
    assert list(found) == list(range(15, 23))
    assert found[22] == []


@pytest.mark.system("aim", "exact")
def test_the_share_that_is_left_before_each_layer():
    method = AIM().bind(QWEN)[0]
    assert [method.kept(layer, 400) for layer in range(15, 23)] == [350, 300, 250, 200, 150, 100, 50, 0]
    half = AIM(left="50%").bind(QWEN)[0]
    assert [half.kept(layer, 400) for layer in range(15, 23)] == [375, 350, 325, 300, 275, 250, 225, 200]
    llama = AIM(first=14, last=21).bind(ModelInfo(depth=32))[0]
    assert [llama.kept(layer, 8) for layer in range(14, 22)] == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(("depth", "layers"), [(28, [15, 22]), (32, [17, 25]), (8, [4, 6]), (4, [2, 3]), (2, [1, 1])])
def test_where_it_drops_at_any_depth(depth, layers):
    steps = _steps(AIM(damping=0.1), ModelInfo(depth=depth))
    assert list(steps) == [-1, *range(layers[0], layers[1] + 1)]
    for layer in range(layers[0], layers[1] + 1):  # where all are dropped, nothing need be ranked
        assert steps[layer].needs == ((PageRank(layer - 1, damping=0.1),) if layer < layers[1] else ())
    assert _steps(AIM(left=1), ModelInfo(depth=depth))[layers[1]].needs == (PageRank(layers[1] - 1),)


def _rows(x, rounds):
    """Outputs of the released code for one picture, in its order."""
    return torch.stack([sum(w * x[j] for j, w in sources.items()) for sources in merge_naive(x.tolist(), rounds)])


def _merges(reduce):
    for n in (16, 49, 30, 2, 1):
        x = tokens(n, n, 8)
        reduction = reduce(View.of(x))
        torch.testing.assert_close(reduction.apply(x)[0], _rows(x[0], 2))


@pytest.mark.system("aim", "exact")
def test_released_merging_written_naively():
    _merges(AIM.as_released().reduce)


@pytest.mark.parametrize("stub", STUBS)
def test_merging_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _merges(lambda view: stub(view, max(1, view.n // 4)))


@pytest.mark.system("aim", "exact")
def test_frames_are_merged_by_themselves_and_in_order():
    layout, x = Layout.grid(7, 7, 4), tokens(0, 196, 8)
    released, raster = AIM.as_released().reduce(View.of(x, layout=layout)), AIM().reduce(View.of(x, layout=layout))
    if layout.tiles.max() == 0:
        want = _rows(x[0], 2)
    else:
        want = torch.cat([_rows(frame, 2) for frame in x[0].split(49)])
    torch.testing.assert_close(released.apply(x)[0], want)
    order = released.representatives[0].argsort()
    assert raster.representatives[0].tolist() == released.representatives[0][order].tolist()
    torch.testing.assert_close(raster.apply(x)[0], want[order])


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_tiles_are_merged_by_themselves(rounds):
    layout, x = Picture.tiled(5, 2, 1).lm, tokens(0, 75, 8)
    reduction = AIM(rounds=rounds).reduce(View.of(x, layout=layout))
    assert reduction.is_stochastic
    assert reduction.ordered
    tiles = torch.tensor(layout.tiles)
    for row, representative in zip(reduction.to_matrix()[0], reduction.representatives[0], strict=True):
        assert set(tiles[row > 0].tolist()) == {int(tiles[representative])}
    for t in range(3):
        own = tiles[reduction.representatives[0]] == t
        made, want = reduction.apply(x)[0][own], _rows(x[0, tiles == t], rounds)
        torch.testing.assert_close(made.sort(0).values, want.sort(0).values)


def test_after_an_earlier_method_all_that_is_left_is_one_group():
    layout, x = Layout.grid(6, 6), tokens(0, 12, 8)
    left = torch.arange(0, 36, 3)[None]
    reduction = AIM(order="matched").reduce(View(x, layout, left, 36))
    torch.testing.assert_close(reduction.apply(x)[0], _rows(x[0], 2))


def test_newlines_stay_where_outputs_are_in_order():
    layout, x = Picture.tiled(5, 2, 1).lm, tokens(0, 75, 8)
    for order, separators in (("raster", "keep"), ("matched", "drop")):
        action = _steps(AIM(order=order))[-1].act(View.of(x, layout=layout), State())[0]
        assert action.separators == separators


def test_broken_tokens_are_left_out_of_means():
    x = tokens(0, 32, 8)
    x[0, [4, 9]] = torch.nan
    view = View.of(x)
    reduction = AIM().reduce(view)
    weights = reduction.to_matrix()[0]
    assert int(view.notes["nan_scores"]) == 2
    assert reduction.is_stochastic
    assert all((row[[4, 9]] == 0).all() or set(row.nonzero()[:, 0].tolist()) <= {4, 9} for row in weights)
    rank = scores(0, 16)
    rank[0, 5] = torch.nan
    step = _steps(AIM(rounds=0, left="50%"))[22]
    assert 5 not in ids(step.act(View.of(tokens(0, 16), {step.needs[0]: rank}), State())[0].reduction)


@pytest.mark.system("aim", "exact")
def test_no_rounds_and_everything_left_is_the_identity():
    method = AIM(rounds=0, left="100%")
    assert -1 not in _steps(method)
    assert all(kept == list(range(30)) for kept in _left(method, 30).values())


@pytest.mark.parametrize(
    "settings", [{"rounds": -1}, {"first": 0, "last": 3}, {"first": 5, "last": 4}, {"damping": 2}, {"order": "none"}]
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        AIM(**settings)


@pytest.mark.parametrize("content", [256, 576, 2880, 25, 105])
@pytest.mark.parametrize("budget", [1, 13, 64, 192, "12.5%", "25%", "60%"])
def test_at_a_budget_exactly_that_is_left(budget, content):
    method = AIM().at_budget(budget, content)
    assert Plan.of(str(Plan((method,)))).methods[0] == method
    rows = AIM(rounds=method.rounds).reduce(View.of(tokens(0, content, 4))).m if method.rounds else content
    want = int(float(budget[:-1]) * content / 100) if isinstance(budget, str) else min(budget, content)
    assert method.bind(QWEN)[0].kept(22, rows) == want


def _distance(view, rows):
    """The mean cosine distance of a token to the nearest output."""
    alike = normalize(view.tokens, dim=-1) @ normalize(rows, dim=-1).mT
    return (1 - alike.amax(2)).mean(1).double().numpy()


def _represents(sample, reduce):
    """All tokens lie nearer to the outputs than to as many in equal steps, for one, two and three rounds."""
    for k in (128, 64, 32):
        views = sample.views["projected"]
        own = over(views, lambda v: _distance(v, reduce(v, k).apply(v.tokens)))  # noqa: B023
        strided = over(views, lambda v: _distance(v, v.tokens[:, :: v.n // k]))  # noqa: B023
        assert gap(own, strided).high < 0


@pytest.mark.system("aim", "directional")
@pytest.mark.xdist_group("samples")
def test_merged_tokens_represent_what_was_there(sample):
    _represents(sample, lambda view, k: AIM(rounds={128: 1, 64: 2, 32: 3}[k]).reduce(view))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", STUBS)
def test_representation_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _represents(sample, stub)


def _late(sample, plan):
    """More is answered right than where all tokens are dropped behind a quarter of the depth."""
    assert gap(sample.right(plan), sample.right(AIM(rounds=0, first=2, last=2))).low > 0


@pytest.mark.system("aim", "directional")
@pytest.mark.xdist_group("samples")
def test_vision_is_needed_early_and_not_late(sample):
    _late(sample, AIM(rounds=0, first=6, last=6))
    with pytest.raises(AssertionError):
        _late(sample, AIM(rounds=0, first=2, last=2))
