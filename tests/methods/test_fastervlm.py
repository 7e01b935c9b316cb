"""FasterVLM by its card: an exact top-k of the [CLS] row, in raster order, equal over tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.view import View
from winnow.methods.fastervlm import FasterVLM
from winnow.signals.vision import VisionAttention
from winnow.testing import WITH_CLS, WITHOUT_CLS, Picture

from .stubs import STUBS, ids, scores, tokens


@pytest.mark.system("fastervlm", "exact")
def test_golden_indices_in_raster_order():
    row = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.3, 0.8]])
    assert ids(FasterVLM(keep=3).reduce(View.of(tokens(0, 6), row))) == [1, 3, 5]


def _keeps_the_best(reduce):
    for seed in range(5):
        row = scores(seed, 40)
        kept = set(ids(reduce(View.of(tokens(seed, 40), row), 8)))
        assert len(kept) == 8
        assert min(row[0, sorted(kept)]) > max(row[0, [j for j in range(40) if j not in kept]])


@pytest.mark.system("fastervlm", "exact")
def test_kept_are_the_top_scored():
    _keeps_the_best(lambda view, k: FasterVLM(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_kept_are_the_top_scored_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _keeps_the_best(stub)


@pytest.mark.system("fastervlm", "exact")
@pytest.mark.parametrize("keep", ["100%", 30, 999])
def test_all_kept_returns_the_input_bit_for_bit(keep):
    x = tokens(1, 30)
    assert torch.equal(FasterVLM(keep=keep).reduce(View.of(x, scores(1, 30))).apply(x), x)


def test_budget_is_split_equally_over_tiles_as_29_for_each_of_5_crops():
    layout = Picture.tiled(6, 2, 2).lm
    reduce = lambda keep: FasterVLM(keep=keep).reduce(View.of(tokens(0, 180), scores(3, 180), layout=layout))  # noqa: E731
    assert torch.bincount(torch.tensor(layout.tiles[ids(reduce(5 * 29))])).tolist() == [29] * 5
    assert torch.bincount(torch.tensor(layout.tiles[ids(reduce(17))])).tolist() == [4, 4, 3, 3, 3]


def test_each_tile_keeps_its_own_best():
    layout, row = Picture.tiled(4, 2, 1).lm, scores(5, 48)
    kept = set(ids(FasterVLM(keep=9).reduce(View.of(tokens(0, 48), row, layout=layout))))
    for tile in range(3):
        mine = [j for j in range(48) if layout.tiles[j] == tile]
        assert kept & set(mine) == set(sorted(mine, key=lambda j: -row[0, j])[:3])


@pytest.mark.parametrize(("info", "query"), [(WITH_CLS, "cls"), (WITHOUT_CLS, "all")])
def test_auto_reads_cls_where_there_is_one_and_its_settings_say_so(info, query):
    (step,) = FasterVLM(keep=2).checked_steps(info)
    assert str(step.at) == "projected"
    assert step.needs == (VisionAttention(VisionAttention().block(info), query=query),)
    assert FasterVLM().bind(info)[0].row == step.needs[0]


def test_cls_on_a_tower_without_one_is_refused_with_what_does_work():
    with pytest.raises(UnsupportedError, match=r"no \[CLS\].*query=auto or query=all"):
        FasterVLM(row=VisionAttention()).checked_steps(WITHOUT_CLS)


def test_layer_is_read_where_it_is_named():
    (step,) = FasterVLM(row=VisionAttention(3, query="auto")).checked_steps(WITH_CLS)
    assert step.needs[0].block(WITH_CLS) == 3
    assert FasterVLM().row.block(WITH_CLS) == 10  # the block whose output is hidden_states[-2] of 12
    with pytest.raises(WinnowError, match="blocks 0 … 11"):
        FasterVLM(row=VisionAttention(12)).checked_steps(WITH_CLS)


def test_the_head_order_of_the_tower_does_not_matter():
    maps = torch.rand(1, 8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reduce = lambda a: ids(FasterVLM(keep=5).reduce(View.of(tokens(0, 30), a.mean(1))))  # noqa: E731
    assert reduce(maps) == reduce(maps.flip(1))


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FasterVLM().keep = 3
