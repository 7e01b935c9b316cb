"""The plan grammar: a round trip, a key, and errors that name what is allowed (B4, B7)."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.core import registry
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.methods.divprune import DivPrune
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.fastv import FastV
from winnow.methods.hiprune import HiPrune
from winnow.methods.pyramiddrop import PyramidDrop
from winnow.methods.todre import ToDRE
from winnow.methods.visionzip import VisionZip
from winnow.methods.vtc_cls import VtcCls
from winnow.signals.vision import VisionAttention, VisionKeys

CLIP_LLAMA = ModelInfo("LLaVA", "llava", depth=32, vision_depth=24, feature_layer=-2)

keeps = st.one_of(
    st.integers(1, 5000),
    st.floats(1e-5, 1, exclude_max=True),
    st.integers(1, 100).map(lambda p: f"{p}%"),
    st.integers(1, 99).map(str),
)
layers = st.lists(st.integers(0, 31), min_size=1, max_size=4, unique=True).map(lambda found: tuple(sorted(found)))
methods = st.one_of(
    st.builds(
        FasterVLM,
        keep=keeps,
        row=st.builds(
            VisionAttention,
            layer=st.sampled_from(["feature", -2, 3]),
            query=st.sampled_from(["auto", "cls", "all"]),
            heads=st.sampled_from(["mean", "sum"]),
        ),
        padding=st.booleans(),
    ),
    st.builds(VtcCls, keep=keeps, start=st.none() | st.integers(-3, 9), combine=st.sampled_from(["sum", "max", "min"])),
    st.builds(VtcCls, keep=keeps, layers=layers),
    st.builds(
        HiPrune, keep=keeps, alpha=st.floats(0, 1), wrap=st.booleans(), object_layer=st.none() | st.integers(-2, 8)
    ),
    st.builds(ToDRE, keep=keeps, stage2=st.booleans(), tau=st.floats(0, 1)),
    st.builds(FastV, keep=keeps, layer=st.integers(0, 31)),
    st.builds(VisionZip, keep=keeps, contextual=st.floats(0, 0.99)),
    st.builds(
        VisionZip,
        dominant=st.integers(1, 200),
        contextual=st.integers(0, 50),
        merge=st.sampled_from(["sum", "mean"]),
        keys=st.builds(VisionKeys, layer=st.integers(-3, 3)),
    ),
    layers.flatmap(
        lambda at: st.builds(
            PyramidDrop, layers=st.just(at), ratios=st.lists(keeps, min_size=len(at), max_size=len(at)).map(tuple)
        )
    ),
)
plans = st.builds(
    Plan,
    st.lists(methods, min_size=1, max_size=3).map(tuple),
    positions=st.sampled_from(["keep", "compact"]),
    seed=st.integers(0, 2**40),
)


@given(plans)
def test_reading_what_was_written_gives_the_same_plan(plan):
    assert Plan.of(str(plan)) == plan
    assert Plan.of(plan.key) == plan
    assert str(Plan.of(str(plan))) == str(plan)
    assert Plan.of(str(plan)).key == plan.key


@given(plans, plans)
def test_equal_keys_are_equal_plans(a, b):
    assert (a.key == b.key) == (a == b)


def test_the_string_leaves_defaults_out_and_the_key_does_not():
    plan = Plan.of("fastervlm:keep=64 + fastv:keep=50%,layer=3 | positions=compact")
    assert str(plan) == "fastervlm + fastv:layer=3 | positions=compact"
    assert plan.key == (
        "v2|fastervlm:keep=64,row=VisionAttention(layer=feature,query=auto,heads=mean),padding=false"
        " + fastv:keep=50%,layer=3 | positions=compact,seed=0"
    )


def test_what_can_be_written():
    plan = Plan.of("  vtc-cls : keep = 0.25 , layers = [ 3, 5 ] + todre:stage2=FALSE | seed = 7 ")
    assert plan == Plan((VtcCls(keep=0.25, layers=(3, 5)), ToDRE(stage2=False)), seed=7)
    assert Plan.of("hiprune:object_layer=none,alpha=5e-2") == Plan((HiPrune(alpha=0.05),))
    assert Plan.of("pyramiddrop:ratios=[60%,0.3,10]") == Plan((PyramidDrop(ratios=("60%", 0.3, 10)),))
    row = VisionAttention(layer=-2, query="all")
    assert Plan.of("fastervlm:row=VisionAttention(layer=-2,query=all),keep=9") == Plan((FasterVLM(9, row),))
    assert Plan.of("visionzip:keys=VisionKeys( layer = -1 )") == Plan((VisionZip(keys=VisionKeys(layer=-1)),))


def test_tuples_of_signals_can_be_written():
    @registry.register("listens")
    class Listens(Method):
        rows: tuple[VisionAttention, ...] = (VisionAttention(),)

    try:
        plan = Plan.of("listens:rows=[VisionAttention(layer=3,query=all),VisionAttention(layer=-1)]")
        assert plan.methods[0].rows == (VisionAttention(3, "all"), VisionAttention(-1))
        assert Plan.of(str(plan)) == Plan.of(plan.key) == plan
    finally:
        registry._extra.pop("listens")
        registry._classes.pop("listens")


def test_a_signal_defined_again_is_the_last_one_and_another_of_that_name_is_refused():
    """As when a notebook's cell is run twice."""

    def defined(module):
        @dataclass(frozen=True)
        class Twice(VisionAttention):
            """A signal."""

        Twice.__module__ = module
        return Twice

    @registry.register("hears-twice")
    class HearsTwice(Method):
        row: VisionAttention = VisionAttention()

    try:
        first, second = defined("here"), defined("here")
        assert first is not second
        assert type(Plan.of("hears-twice:row=Twice(layer=3)").methods[0].row) is second
        third = defined("there")
        with pytest.raises(WinnowError, match="names the signal Twice; known, and known once, are"):
            Plan.of("hears-twice:row=Twice(layer=3)")
        assert third.__module__ == "there"
    finally:
        registry._extra.pop("hears-twice")
        registry._classes.pop("hears-twice")


def test_a_default_that_the_type_does_not_allow_has_to_be_given():
    @registry.register("needs-layers")
    class NeedsLayers(Method):
        layers: tuple[int, ...] = ()
        count: int = None  # type: ignore[assignment]

    try:
        assert str(Plan((NeedsLayers((3, 4), 2),))) == "needs-layers:layers=[3,4],count=2"
        with pytest.raises(WinnowError, match=r"needs-layers: layers=\(\); allowed: a list of: an int"):
            Plan.of("needs-layers")
    finally:
        registry._extra.pop("needs-layers")
        registry._classes.pop("needs-layers")


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("hiprune:released", Plan((HiPrune(wrap=True, padding=True),), positions="compact")),
        ("hiprune:released,keep=64", Plan((HiPrune(64, wrap=True, padding=True),), positions="compact")),
        ("hiprune:keep=64,released,wrap=false", Plan((HiPrune(64, padding=True),), positions="compact")),
        ("hiprune:released | positions=keep", Plan((HiPrune(wrap=True, padding=True),))),
        ("fastv:released,layer=3", Plan((FastV(layer=3),))),
        ("fastervlm:released", Plan((FasterVLM(row=VisionAttention(), padding=True),), positions="compact")),
        (
            "divprune:released + pyramiddrop:released | seed=3",
            Plan((DivPrune(), PyramidDrop()), positions="compact", seed=3),
        ),
        (
            "divprune + hiprune:released | positions=compact",
            Plan((DivPrune(), HiPrune(wrap=True, padding=True)), positions="compact"),
        ),
    ],
)
def test_released_is_a_word(text, plan):
    assert Plan.of(text) == plan
    assert Plan.of(str(plan)) == plan


def test_of_takes_plans_methods_and_strings():
    plan = Plan((FasterVLM(keep=9),), positions="compact")
    assert Plan.of(plan) is plan
    assert Plan.of(FasterVLM(keep=9), positions="compact") == plan
    assert Plan.of(plan, positions="keep").positions == "keep"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Cannot read ''"),
        ("fastervlm + ", "Cannot read ''"),
        ("fastervlm:keep", "Cannot read 'keep'"),
        ("fastervlm:keep=", "Cannot read 'keep='"),
        ("fastervlm:=3", "Cannot read '=3'"),
        ("fastervlm:keep=3,keep=4", "'keep' is given twice"),
        ("fastervlm:kep=3", "no setting 'kep'; it has keep, row, padding. Did you mean 'keep'"),
        ("fastervlm:keep=[3", "Unclosed bracket"),
        ("fastervlm | positions=near", "positions='near'; allowed: keep, compact"),
        ("fastervlm | seed=-1", "seed=-1; allowed: an int ≥ 0"),
        ("fastervlm | seed=true", "seed=True"),
        ("fastervlm | speed=1", "Unknown plan option speed"),
        ("fastervlm | seed=1 | positions=keep", "more than one '|'"),
        ("v1|fastervlm", "schema 1; this winnow reads schema 2"),
        ("fastervlm!", "Cannot read 'fastervlm!'"),
        ("fastervlm:keep=much", "keep='much' cannot be read; allowed"),
        ("fastervlm:query=cls", "no setting 'query'; it has keep, row, padding"),
        ("fastervlm:row=cls", "fastervlm: row='cls'; allowed: a signal such as VisionAttention(…)"),
        ("fastervlm:row=Attention(layer=3)", "names the signal Attention; known, and known once, are: "),
        (
            "fastervlm:row=VisionAttention(depth=3)",
            "VisionAttention has no setting 'depth'; it has heads, layer, query",
        ),
        ("fastervlm:row=VisionAttention(query=last)", "query is one of 'cls', 'all', 'auto'; got 'last'"),
        ("fastervlm:row=VisionKeys(layer=3)", "allowed: a signal such as VisionAttention(…)"),
        ("fastervlm:row=VisionAttention(layer=3", "Unclosed bracket in 'VisionAttention(layer=3'"),
        ("fastervlm:relased", "Cannot read 'relased'"),
        ("fastervlm:released,released", "'released' is given twice"),
        ("todre:released", "todre declares no released settings: no code of its authors is known"),
        ("fastv:released + pyramiddrop:released", "do not share a position policy; write | positions=keep or"),
        ("fastv:released + divprune", "do not share a position policy"),
    ],
)
def test_errors_say_what_was_got(text, message):
    with pytest.raises(WinnowError) as error:
        Plan.of(text)
    assert message in str(error.value)


@pytest.mark.parametrize("value", [3, None, ["fastervlm"], FasterVLM])
def test_other_types_are_refused(value):
    with pytest.raises(WinnowError, match="A plan is a string, a plan file, a Method or a Plan"):
        Plan.of(value)
    with pytest.raises(WinnowError, match="made of Methods"):
        Plan((value,))


def test_the_full_model_is_a_plan_too():
    assert Plan.of("full") == Plan(())
    assert Plan.of(str(Plan((), seed=3))) == Plan((), seed=3)
    assert Plan.of(Plan(()).key) == Plan(())
    assert Plan(()).steps(CLIP_LLAMA) == ()


@pytest.mark.parametrize(
    ("slug", "near"), [("fastervml", "fastervlm"), ("fast-v", "fastv"), ("pyramid-drop", "pyramiddrop")]
)
def test_B7_unknown_method_names_the_nearest(slug, near):
    with pytest.raises(WinnowError, match=rf"Unknown method {slug!r}; known: .*divprune.*Did you mean .*{near}"):
        Plan.of(slug)


def test_B7_unknown_method_that_is_like_nothing_lists_the_known():
    with pytest.raises(WinnowError, match=r"known: .*divprune") as error:
        Plan.of("qqqqqqq")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("text", ["fastv:layer=32", "pyramiddrop:layers=[8,16,99]"])
def test_B4_layer_beyond_the_model(text):
    with pytest.raises(WinnowError, match=r"32 LM layers; a step acts before layer 0 … 31"):
        Plan.of(text).steps(CLIP_LLAMA)


@pytest.mark.parametrize("text", ["fastv:layer=-1", "pyramiddrop:layers=[16,8,24]", "pyramiddrop:layers=[8,8,24]"])
def test_B4_layer_negative_double_or_not_in_order(text):
    with pytest.raises(WinnowError, match="allowed"):
        Plan.of(text)


def test_B4_the_last_layer_can_be_cut_before():
    ((_, step),) = Plan.of("fastv:layer=31").steps(CLIP_LLAMA)
    assert str(step.at) == "layers[31]"


def test_B8_a_model_that_cannot_is_refused_before_data():
    no_cls = ModelInfo("Qwen", "qwen2_5_vl", depth=28, vision_depth=32, has_cls=False, points=("projected", "layers"))
    with pytest.raises(UnsupportedError, match=r"vtc-cls cannot run on Qwen.*no \[CLS\].*`winnow methods` lists"):
        Plan.of("vtc-cls").steps(no_cls)
    with pytest.raises(
        UnsupportedError, match=r"hiprune acts at features, which Qwen does not offer.*projected, layers"
    ):
        Plan.of("hiprune:padding=true").steps(no_cls)


def test_steps_go_along_the_data_and_keep_the_order_of_the_plan_at_one_point():
    plan = Plan.of("pyramiddrop + fastv:layer=8 + hiprune + divprune + visionzip")
    found = [(number, str(step.at)) for number, step in plan.steps(CLIP_LLAMA)]
    assert found == [
        (4, "features"),
        (2, "projected"),
        (3, "projected"),
        (0, "layers[8]"),
        (1, "layers[8]"),
        (0, "layers[16]"),
        (0, "layers[24]"),
    ]
