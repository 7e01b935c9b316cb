"""ToDRE by its card: greedy max-sum (or k-center) from a pivot; then all or nothing deep in the LM."""

from __future__ import annotations

import pytest
import torch

from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.step import Observe, Reduce, State
from winnow.core.view import View
from winnow.methods.todre import CLS_ROW, ToDRE
from winnow.parts.greedy import greedy_naive
from winnow.signals.language import LMAttentionMass
from winnow.signals.vision import VisionAttention
from winnow.testing import WITHOUT_CLS, Picture

from .stubs import STUBS, ids, scores, tokens

LLAMA = ModelInfo(depth=32, vision_depth=24, feature_layer=-2)
CRITERIA = ("sum", "max")


def _similarity(x):
    unit = torch.nn.functional.normalize(x, dim=-1)
    return unit @ unit.T


def _reduce(x, k, criterion="sum", row=None, **more):
    row = scores(0, x.shape[1]) if row is None else row
    return ToDRE(keep=k, criterion=criterion, **more).reduce(View.of(x, row))


def _greedy(reduce, criterion):
    for seed in range(10):
        x, row = tokens(seed, 12, 8), scores(seed, 12)
        for k in (1, 2, 6, 12):
            want = greedy_naive(_similarity(x[0]).tolist(), int(row.argmax()), k, criterion)
            assert ids(reduce(x, k, row)) == sorted(want)


@pytest.mark.system("todre", "exact")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_equals_brute_force_on_12_tokens(criterion):
    _greedy(lambda x, k, row: _reduce(x, k, criterion, row), criterion)


@pytest.mark.parametrize("stub", STUBS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_brute_force_fails_for_a_stub(stub, criterion):
    with pytest.raises(AssertionError):
        _greedy(lambda x, k, row: stub(View.of(x), k), criterion)


@pytest.mark.system("todre", "exact")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_all_kept_where_k_is_n(criterion):
    assert ids(_reduce(tokens(0, 20), 20, criterion)) == list(range(20))


@pytest.mark.system("todre", "exact")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_duplicates_of_the_pivot_come_after_distinct_tokens(criterion):
    """Of any tokens for the max. The sum can return to the pivot once opposites have been taken; of orthogonal
    tokens, where a duplicate alone has a similarity above 0, it cannot."""
    x = tokens(3, 10) if criterion == "max" else torch.eye(10)[None].clone()
    x[0, [2, 5, 7]] = x[0, 4].clone()
    row = torch.zeros(1, 10)
    row[0, 4] = 1
    for k in range(1, 8):
        assert not {2, 5, 7} & set(ids(_reduce(x, k, criterion, row)))


@pytest.mark.system("todre", "exact")
@pytest.mark.parametrize("criterion", CRITERIA)
def test_permuting_tokens_permutes_the_selection(criterion):
    for seed in range(5):
        x, row = tokens(seed, 40, 24), scores(seed, 40)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        plain = ids(_reduce(x, 9, criterion, row))
        moved = ids(_reduce(x[:, order], 9, criterion, row[:, order]))
        assert sorted(order[moved].tolist()) == plain


def _clusters(seed, sizes=(60, 30, 10, 5, 3, 2, 1, 1)):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(len(sizes), 32, generator=generator), dim=-1)
    member = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return centres[member][None] + 0.02 * torch.randn(1, len(member), 32, generator=generator), member


def _covers(reduce):
    for seed in range(5):
        x, member = _clusters(seed)
        assert set(member[ids(reduce(x, 8))].tolist()) == set(range(8))


@pytest.mark.system("todre", "directional")
def test_k_center_covers_all_planted_clusters():
    _covers(lambda x, k: _reduce(x, k, "max"))


@pytest.mark.parametrize("stub", STUBS)
def test_cover_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _covers(lambda x, k: stub(View.of(x), k))


@pytest.mark.system("todre", "directional")
def test_spread_of_max_is_at_least_that_of_sum_and_that_of_the_cls_ranking():
    """Mean over seeds of the smallest pairwise distance; [CLS] attention follows the largest cluster."""

    def spread(x, kept):
        distance = 1 - _similarity(x[0, kept])
        return distance[~torch.eye(len(kept), dtype=torch.bool)].min().item()

    found = {"max": 0.0, "sum": 0.0, "cls": 0.0}
    for seed in range(20):
        x, member = _clusters(seed)
        row = scores(seed, len(member)) + (member == 0)
        for criterion in CRITERIA:
            found[criterion] += spread(x, ids(_reduce(x, 8, criterion, row))) / 20
        found["cls"] += spread(x, row[0].topk(8).indices.tolist()) / 20
    assert found["max"] > found["sum"] > found["cls"]


def test_pivot_is_the_thumbnail_token_that_cls_attends_to():
    layout = Picture.tiled(4, 2, 1).lm
    row = scores(0, 48) * 0.5
    row[0, 30], row[0, 11] = 1.0, 0.9  # 30 is in the mosaic, 11 in the thumbnail
    view = View.of(tokens(0, 48), row, layout=layout)
    assert ids(ToDRE(keep=1).reduce(view)) == [11]


def test_a_broken_token_is_no_pivot():
    x, row = tokens(0, 12), scores(0, 12) * 0.5
    row[0, 3], x[0, 3, 0] = 1.0, torch.nan
    view = View.of(x, row)
    assert ids(ToDRE(keep=1).reduce(view)) == [row[0].topk(2).indices[1].item()]
    assert int(view.notes["nan_scores"]) == 1


def test_pivot_of_a_video_is_the_best_over_all_frames():
    row = scores(0, 48) * 0.5
    row[0, 40] = 1.0
    assert ids(ToDRE(keep=1).reduce(View.of(tokens(0, 48), row, layout=Layout.grid(4, 4, 3)))) == [40]


def test_pivot_is_random_without_cls_and_follows_the_seed():
    step = ToDRE(keep=1).checked_steps(WITHOUT_CLS)[0]
    assert step.needs == ()
    picks = [ids(step.act(View.of(tokens(0, 50), seed=seed), State())[0].reduction) for seed in (0, 0, 1, 2, 3)]
    assert picks[0] == picks[1]
    assert len({p[0] for p in picks}) > 1


def test_first_stage_reads_the_last_vision_block():
    step = ToDRE().checked_steps(LLAMA)[0]
    assert step.needs == (VisionAttention(23),)
    assert CLS_ROW.block(LLAMA) == 23


@pytest.mark.system("todre", "exact")
def test_second_stage_acts_where_28_of_32_layers_have_run():
    first, second = ToDRE().checked_steps(LLAMA)
    assert (str(first.at), str(second.at)) == ("projected", "layers[28]")
    assert second.needs == (
        LMAttentionMass(27, rows="question", keys="items"),
        LMAttentionMass(27, rows="items", keys="question"),
    )
    assert len(ToDRE(stage2=False).checked_steps(LLAMA)) == 1
    assert len(ToDRE().checked_steps(ModelInfo(depth=1, vision_depth=4))) == 1
    assert str(ToDRE().checked_steps(ModelInfo(depth=2, vision_depth=4))[1].at) == "layers[1]"


def _second(towards, back, n=6, tau=0.10):
    step = ToDRE(tau=tau).checked_steps(LLAMA)[1]
    masses = dict(zip(step.needs, (torch.tensor(towards), torch.tensor(back)), strict=True))
    return step.act(View.of(tokens(0, n, b=len(towards)), masses), State())[0]


@pytest.mark.system("todre", "exact")
def test_second_stage_fires_for_each_item_whose_two_masses_are_low():
    action = _second([0.05, 0.05, 0.30, 0.09], [0.0, 0.2, 0.0, 0.09])
    assert isinstance(action, Reduce)
    assert action.reduction.counts == (0, 6, 6, 0)
    assert [ids(action.reduction, i) for i in range(4)] == [[], list(range(6)), list(range(6)), []]


@pytest.mark.system("todre", "exact")
def test_second_stage_drops_everything_or_leaves_all():
    assert _second([0.01, 0.02], [0.0, 0.0]).reduction.m == 0
    assert isinstance(_second([0.1, 0.5], [0.0, 0.0]), Observe)  # τ itself is not below τ
    assert isinstance(_second([0.0], [0.0], tau=0.0), Observe)
    assert isinstance(_second([float("nan")], [0.0]), Observe)


def test_the_sum_may_pick_neighbours_where_the_max_does_not():
    """Two opposite extremes: the sum returns to them, the max goes to the middle."""
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.999, 0.02], [-0.999, 0.02], [0.0, 1.0]]])
    row = torch.tensor([[1.0, 0, 0, 0, 0]])
    assert ids(_reduce(x, 3, "max", row)) == [0, 1, 4]
    assert ids(ToDRE(keep=2).reduce(View.of(x, {CLS_ROW: row}))) == [0, 1]
