"""Methods and views: settings, checked steps, signals, and random numbers of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from winnow.core.budget import Budget
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.signals.language import LMAttention, LMAttentionMass
from winnow.signals.vision import VisionAttention, VisionKeys
from winnow.core.step import Reduce, State, Step
from winnow.core.view import View

INFO = ModelInfo("M", depth=4, vision_depth=6, feature_layer=-2)


@dataclass(frozen=True)
class Sugar(Method):
    """One step, one signal."""

    keep: Budget = Budget(3)
    level: int = 1
    row: Signal = field(default=VisionAttention(layer=1), metadata={"setting": False})

    slug = "sugar"

    def reduce(self, view):
        return Reduction.select(view[self.row].topk(self.keep.of(view)).indices.sort(1).values, view.n)


def test_a_plain_number_becomes_a_budget():
    assert Sugar(keep=7).keep == Budget(7)
    assert Sugar(keep="50%").keep == Budget("50%")
    with pytest.raises(WinnowError, match="allowed"):
        Sugar(keep=1.0)


def test_signals_are_needs_and_no_settings():
    (step,) = Sugar().checked_steps(INFO)
    assert step.at == Point("projected")
    assert step.needs == (VisionAttention(layer=1),)
    assert list(Sugar.settings()) == ["keep", "level"]


def test_configured_names_the_nearest_setting():
    assert Sugar.configured(keep=2, level=5) == Sugar(keep=2, level=5)
    with pytest.raises(WinnowError, match=r"sugar has no setting 'levle'; it has keep, level. Did you mean 'level'"):
        Sugar.configured(levle=1)
    with pytest.raises(WinnowError, match="no setting 'row'"):
        Sugar.configured(row=3)


def test_a_step_runs_reduce():
    (step,) = Sugar(keep=2).checked_steps(INFO)
    state = State(item={"seen": torch.ones(1)})
    action, after = step.run(View.of(torch.zeros(1, 4, 2), torch.tensor([[1.0, 4, 2, 3]])), state)
    assert isinstance(action, Reduce)
    assert action.reduction.index.tolist() == [[1, 3]]
    assert after is state


def test_a_method_that_defines_nothing_says_so():
    with pytest.raises(NotImplementedError, match="neither reduce"):
        Method().reduce(View.of(torch.zeros(1, 1, 1)))


@pytest.mark.parametrize(
    ("at", "needs", "error", "message"),
    [
        (Point("frames"), (), UnsupportedError, "acts at frames, which M does not offer; it offers features"),
        (Point("layers", 4), (), WinnowError, "M has 4 LM layers"),
        (Point("projected"), (VisionAttention(layer=6),), WinnowError, "blocks 0 … 5"),
        (Point("projected"), (VisionAttention(query="x"),), WinnowError, "'cls' or 'all'"),
        (Point("projected"), (VisionAttention(heads="max"),), WinnowError, "'mean' or 'sum'"),
        (Point("projected"), (VisionKeys(layer=-7),), WinnowError, "blocks 0 … 5"),
        (Point("layers", 1), (LMAttention(4),), WinnowError, "language model of M has blocks 0 … 3"),
        (Point("layers", 1), (LMAttention(0, rows="all"),), WinnowError, "'last' or 'question'"),
        (Point("layers", 1), (LMAttentionMass(0, keys="text"),), WinnowError, "'question' or 'items'"),
    ],
)
def test_B8_steps_are_checked_against_the_model(at, needs, error, message):
    @dataclass(frozen=True)
    class Acts(Method):
        def steps(self, info):
            return (Step(at, self._run, needs),)

    with pytest.raises(error, match=message):
        Acts().checked_steps(INFO)


def test_layers_by_share_of_the_depth():
    assert [ModelInfo(depth=32).at_depth(share) for share in (0, 0.25, 7 / 8, 1)] == [0, 8, 28, 31]
    for bad in (-1, 4, True, 1.0, "2"):
        with pytest.raises(WinnowError, match="a step acts before layer 0 … 3"):
            INFO.lm_layer(bad)


def test_points():
    assert Point.of("layers[3]") == Point("layers", 3)
    assert str(Point.of("projected")) == "projected"
    assert [Point.of(p).stage for p in ("frames", "features", "projected", "layers[0]", "kv[1]")] == [
        "input",
        "connector",
        "connector",
        "decoder",
        "cache",
    ]
    points = [Point.of(p) for p in ("layers[10]", "kv[0]", "layers[2]", "projected", "features")]
    assert [str(p) for p in sorted(points, key=lambda p: p.rank)] == [
        "features",
        "projected",
        "layers[2]",
        "layers[10]",
        "kv[0]",
    ]
    for bad in ("layers", "projected[1]", "layers[x]", "middle", ""):
        with pytest.raises(WinnowError):
            Point.of(bad)


def test_view_answers_for_what_it_holds():
    row = torch.rand(1, 3)
    view = View.of(torch.zeros(1, 3, 2), {VisionKeys(): row})
    assert view[VisionKeys(layer="feature")] is row
    with pytest.raises(WinnowError, match=r"has no VisionAttention.*Present: VisionKeys"):
        view[VisionAttention()]
    assert View.of(torch.zeros(1, 3, 2), row)[VisionAttention(layer=9)] is row
    with pytest.raises(WinnowError, match=r"\[b, N, D\]; got \(3, 2\)"):
        View.of(torch.zeros(3, 2))


def test_view_counts_budgets_from_entry():
    assert View.of(torch.zeros(2, 6, 1)).n_visual == 6
    assert View.of(torch.zeros(1, 7, 1), layout=Layout.grid(2, 3, cls=True)).n_visual == 6
    assert View.of(torch.zeros(1, 6, 1), n_visual=24).n_visual == 24


def test_random_numbers_are_the_views_own():
    before = torch.random.get_rng_state()
    view = View.of(torch.zeros(3, 5, 1), seed=1)
    drawn = view.rand(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn.shape == (3, 5)
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn, view.rand(5))
    assert not torch.equal(drawn, View.of(torch.zeros(3, 5, 1), seed=2).rand(5))


def test_groups_follow_the_ids():
    view = View(torch.zeros(2, 2, 1), Layout.grid(1, 4), torch.tensor([[0, 3], [1, 2]]), 4)
    assert view.groups([10, 11, 12, 13]).tolist() == [[10, 13], [11, 12]]
