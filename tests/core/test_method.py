"""Methods and views: what a method need not write, checked steps, signals, and random numbers of one's own."""

from dataclasses import dataclass
from typing import ClassVar

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
from winnow.core.step import Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.signals.language import LMAttention, LMAttentionMass
from winnow.signals.vision import VisionAttention, VisionKeys
from winnow.testing import Picture

INFO = ModelInfo("M", depth=4, vision_depth=6, feature_layer=-2)
NO_CLS = ModelInfo("N", depth=4, vision_depth=6, has_cls=False)


@dataclass(frozen=True)
class Sugar(Method):
    """Ranks by one signal: nothing but the score is written."""

    keep: Budget = Budget(3)
    level: int = 1
    row: VisionAttention = VisionAttention(layer=1)

    slug = "sugar"

    def score(self, view):
        return view[self.row]


@dataclass(frozen=True)
class InTiles(Sugar):
    """The same in each tile."""

    per_tile = True


@dataclass(frozen=True)
class Several(Method):
    """Several signals in one setting, and one more."""

    keep: Budget = Budget("30%")
    rows: tuple[VisionAttention, ...] = (VisionAttention(-1, query="auto"), VisionAttention())
    keys: VisionKeys = VisionKeys(layer=-1)

    slug = "several"
    at = "features"
    rounding = "floor"
    separators = "drop"
    released: ClassVar = {"keep": "40%", "positions": "compact"}

    def reduce(self, view):
        return Reduction.select(torch.arange(self.keep.of(view)).expand(view.b, -1), view.n)


ROW = torch.tensor([[1.0, 4, 2, 3]])


def test_a_plain_number_becomes_a_budget_with_the_rounding_of_the_method():
    assert Sugar(keep=7).keep == Budget(7)
    assert Sugar(keep="50%").keep.of(5) == 3
    assert Several(keep="50%").keep.of(5) == 2
    assert Several(keep=Budget("50%")).keep == Several(keep=0.5).keep.__class__("50%", rounding="floor")
    with pytest.raises(WinnowError, match="allowed"):
        Sugar(keep=1.0)


def test_a_score_is_enough_for_a_method():
    (step,) = Sugar(keep=2).checked_steps(INFO)
    assert (step.at, step.needs) == (Point("projected"), (VisionAttention(layer=1),))
    state = State(item={"seen": torch.ones(1)})
    action, after = step.act(View.of(torch.zeros(1, 4, 2), ROW), state)
    assert isinstance(action, Reduce)
    assert action.reduction.index.tolist() == [[1, 3]]
    assert action.separators == "keep"
    assert after is state


def test_a_score_in_tiles_shares_the_budget():
    layout = Picture.tiled(2, 1, 1).lm  # two tiles of four
    view = View.of(torch.zeros(1, 8, 2), torch.tensor([[9.0, 8, 7, 6, 1, 3, 2, 0]]), layout=layout)
    assert Sugar(keep=4).reduce(view).index.tolist() == [[0, 1, 2, 3]]
    assert InTiles(keep=4).reduce(view).index.tolist() == [[0, 1, 5, 6]]


def test_the_identity_has_a_default():
    assert Sugar.identity == {"keep": "100%"}
    view = View.of(torch.zeros(1, 4, 2), ROW)
    assert Sugar.configured(**Sugar.identity).reduce(view).index.tolist() == [[0, 1, 2, 3]]


def test_signals_are_settings_and_what_a_step_needs():
    assert list(Sugar.settings()) == ["keep", "level", "row"]
    assert Several().signals() == (*Several().rows, VisionKeys(layer=-1))
    (step,) = Several().checked_steps(INFO)
    assert step.at == Point("features")
    assert step.needs == (VisionAttention(5, query="cls"), VisionAttention(4, query="cls"), VisionKeys(5))


def test_a_resolved_method_has_definite_signals():
    resolved, _ = Sugar(row=VisionAttention(layer=-1, query="auto")).bind(NO_CLS)
    assert resolved.row == VisionAttention(layer=5, query="all")
    assert resolved.resolve(NO_CLS) is not None
    resolved, _ = Several(rows=(VisionAttention(query="all"),)).bind(NO_CLS)
    assert resolved.rows == (VisionAttention(layer=5, query="all"),)
    with pytest.raises(UnsupportedError, match=r"sugar cannot run on N: .*no \[CLS\]"):
        Sugar().bind(NO_CLS)


def test_a_step_reads_a_signal_by_the_name_that_it_was_listed_by():
    """`resolve` makes signals definite; steps that close over the unresolved one still find it."""

    @dataclass(frozen=True)
    class Closed(Method):
        row: VisionAttention = VisionAttention(layer=-1, query="auto")

        def steps(self, info):
            name = VisionAttention(layer=-1, query="auto")
            return (Step(Point("projected"), lambda view, state: self._half(view, name), (name,)),)

        def _half(self, view, name):
            return Reduction.select(view[name].topk(2).indices.sort(1).values, view.n)

    (step,) = Closed().checked_steps(INFO)
    assert step.needs == (VisionAttention(5, query="cls"),)
    values = step.signals(lambda signal: {VisionAttention(5, query="cls"): ROW}[signal])
    action, _ = step.act(View.of(torch.zeros(1, 4, 2), values), State())
    assert action.reduction.index.tolist() == [[1, 3]]


def test_a_step_may_return_a_bare_reduction_an_action_or_either_with_a_state():
    view, found = View.of(torch.zeros(1, 4, 2)), Reduction.select(torch.tensor([[0, 2]]), 4)
    old, new = State(), State(item={"x": torch.ones(1)})
    for answer, reduction, after in (
        (found, found, old),
        (Reduce(found), found, old),
        ((found, new), found, new),
        ((Reduce(found, "drop"), new), found, new),
    ):
        action, state = Step(Point("projected"), lambda view, state, answer=answer: answer).act(view, old)
        assert isinstance(action, Reduce)
        assert action.reduction is reduction
        assert state is after
    action, state = Step(Point("projected"), lambda view, state: Observe()).act(view, old)
    assert isinstance(action, Observe)
    assert state is old


def test_one_step_methods_say_whether_newlines_stay():
    action, _ = Several().checked_steps(INFO)[0].act(View.of(torch.zeros(1, 10, 2)), State())
    assert action.separators == "drop"


def test_configured_names_the_nearest_setting():
    assert Sugar.configured(keep=2, level=5) == Sugar(keep=2, level=5)
    with pytest.raises(
        WinnowError, match=r"sugar has no setting 'levle'; it has keep, level, row. Did you mean 'level'"
    ):
        Sugar.configured(levle=1)


def test_as_released():
    assert Several.as_released() == Several(keep="40%")
    assert Several.as_released(keep=9, keys=VisionKeys(layer=2)) == Several(keep=9, keys=VisionKeys(layer=2))
    with pytest.raises(WinnowError, match="sugar declares no released settings"):
        Sugar.as_released()


def test_at_another_budget():
    assert Sugar(level=4).at_budget("12.5%", 256) == Sugar(keep="12.5%", level=4)
    assert Sugar().at_budget(Budget(7), 256) == Sugar(keep=7)

    @dataclass(frozen=True)
    class Fixed(Method):
        level: int = 1

        slug = "fixed"

    with pytest.raises(UnsupportedError, match=r"fixed has no setting `keep`.*fixed:level=…"):
        Fixed().at_budget(7, 256)


def test_a_method_that_defines_nothing_says_so():
    with pytest.raises(NotImplementedError, match=r"defines none of score\(view\), reduce\(view\), steps\(info\)"):
        Method().reduce(View.of(torch.zeros(1, 1, 1)))


def test_a_signal_that_defines_nothing_says_so():
    with pytest.raises(NotImplementedError, match="where it listens"):
        Signal().site(INFO)
    with pytest.raises(NotImplementedError, match="what it reads"):
        Signal().read(None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionAttention(query="x"), "VisionAttention: query is one of 'cls', 'all', 'auto'; got 'x'"),
        (lambda: VisionAttention(heads="max"), "heads is one of 'mean', 'sum'; got 'max'"),
        (lambda: LMAttention(0, rows="all"), "rows is one of 'last', 'question', 'items'; got 'all'"),
        (lambda: LMAttentionMass(0, keys="text"), "keys is one of 'items', 'question'; got 'text'"),
    ],
)
def test_words_of_signals_are_checked_when_they_are_made(make, message):
    with pytest.raises(WinnowError, match=message):
        make()


@pytest.mark.parametrize(
    ("at", "needs", "error", "message"),
    [
        (Point("frames"), (), UnsupportedError, "acts at frames, which M does not offer; it offers features"),
        (Point("prompt"), (), UnsupportedError, "M does not offer; .* Instead: leave pictures out of the messages"),
        (Point("pixels"), (), UnsupportedError, "M does not offer; .* Instead: cut and scale pictures ahead"),
        (Point("decode"), (), UnsupportedError, r"M does not offer; .* Instead: give a KVStep at kv\[k\]"),
        (Point("layers", 4), (), WinnowError, "M has 4 LM layers"),
        (Point("projected"), (VisionAttention(layer=6),), WinnowError, "blocks 0 … 5"),
        (Point("projected"), (VisionKeys(layer=-7),), WinnowError, "blocks 0 … 5"),
        (Point("layers", 1), (LMAttention(4),), WinnowError, "language model of M has blocks 0 … 3"),
    ],
)
def test_B8_steps_are_checked_against_the_model(at, needs, error, message):
    @dataclass(frozen=True)
    class Acts(Method):
        def steps(self, info):
            return (Step(at, lambda view, state: Observe(), needs),)

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
