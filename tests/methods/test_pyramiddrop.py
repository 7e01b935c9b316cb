"""PyramidDrop by its card: three cuts, counted from the number at entry, by the last prompt token."""

from __future__ import annotations

import pytest
import torch

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.pyramiddrop import PyramidDrop
from winnow.signals.language import LMAttention

from .stubs import STUBS, ids, scores, tokens

LLAMA = ModelInfo(model="Llama", depth=32)


def _chain(method, n, info=LLAMA, b=1):
    """Ids that are left after each cut; the last prompt token attends to token j with `row[j]` in every layer."""
    row, layout = scores(7, n, b), Layout.grid(1, n)
    held, found = torch.arange(n).expand(b, n), {}
    for step in method.checked_steps(info):
        view = View(tokens(0, held.shape[1], b=b), layout, held, n, {step.needs[0]: row.gather(1, held)})
        held = held.gather(1, step.act(view, State())[0].reduction.index)
        found[step.at.index] = held
    return row, found


@pytest.mark.system("pyramiddrop", "exact")
def test_counts_of_the_three_cuts_of_576():
    _, found = _chain(PyramidDrop(), 576, b=2)
    assert {layer: held.shape for layer, held in found.items()} == {8: (2, 288), 16: (2, 144), 24: (2, 72)}
    assert pytest.approx(0.469, abs=1e-3) == (576 + 288 + 144 + 72) / (4 * 576)


@pytest.mark.system("pyramiddrop", "exact")
def test_each_cut_keeps_what_the_last_token_attends_to():
    row, found = _chain(PyramidDrop(), 100)
    for layer, k in ((8, 50), (16, 25), (24, 12)):
        assert found[layer][0].tolist() == row[0].topk(k).indices.sort().values.tolist()


def _best(reduce):
    row = scores(3, 40)
    assert ids(reduce(View.of(tokens(0, 40), row), 20)) == row[0].topk(20).indices.sort().values.tolist()


def test_cut_on_plain_tensors():
    _best(lambda view, k: PyramidDrop().cut(view, LMAttention(8), Budget(k)))


@pytest.mark.parametrize("stub", STUBS)
def test_cut_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _best(stub)


@pytest.mark.system("pyramiddrop", "exact")
def test_counts_are_cut_off_not_rounded():
    _, found = _chain(PyramidDrop(), 15)
    assert [held.shape[1] for held in found.values()] == [7, 3, 1]
    _, found = _chain(PyramidDrop(), 3)
    assert [held.shape[1] for held in found.values()] == [1, 1, 1]  # never none


@pytest.mark.system("pyramiddrop", "exact")
def test_ratios_of_all_are_the_identity():
    _, found = _chain(PyramidDrop(ratios=("100%", "100%", "100%")), 30)
    assert all(held[0].tolist() == list(range(30)) for held in found.values())


def test_the_query_is_that_of_the_layer_which_follows():
    steps = PyramidDrop().checked_steps(LLAMA)
    assert [str(s.at) for s in steps] == ["layers[8]", "layers[16]", "layers[24]"]
    assert [s.needs for s in steps] == [(LMAttention(k, rows="last"),) for k in (8, 16, 24)]


def test_ratios_count_from_what_entered_the_lm_also_between_its_cuts():
    """After a connector method left 20 of 30 tokens, half is 10, and a quarter is 5 whatever is left by then."""
    half, quarter, _ = PyramidDrop().checked_steps(LLAMA)
    for step, n, expected in ((half, 20, 10), (quarter, 10, 5), (half, 9, 9)):
        view = View.of(tokens(0, n), {step.needs[0]: scores(0, n)}, n_visual=30, n_lm=20)
        assert step.act(view, State())[0].reduction.m == expected


@pytest.mark.parametrize(
    ("depth", "layers"), [(28, [7, 14, 21]), (4, [1, 2, 3]), (3, [0, 1, 2]), (2, [0, 1]), (1, [0])]
)
def test_default_cuts_at_any_depth(depth, layers):
    steps = PyramidDrop().checked_steps(ModelInfo(depth=depth))
    assert [s.at.index for s in steps] == layers


def test_on_one_layer_the_deepest_cut_holds():
    (step,) = PyramidDrop().checked_steps(ModelInfo(depth=1))
    view = View.of(tokens(0, 16), {step.needs[0]: scores(0, 16)})
    assert step.act(view, State())[0].reduction.m == 2


def test_layers_and_ratios_of_ones_own():
    plan = Plan.of("pyramiddrop:ratios=[60%,10],layers=[3,9]")
    assert [(s.at.index, s.needs[0].layer) for _, s in plan.steps(LLAMA)] == [(3, 3), (9, 9)]
    _, found = _chain(plan.methods[0], 50)
    assert [held.shape[1] for held in found.values()] == [30, 10]
    assert [s.at.index for s in PyramidDrop(ratios=(0.5,)).checked_steps(LLAMA)] == [16]


@pytest.mark.parametrize(
    "settings",
    [
        {"ratios": ()},
        {"ratios": 0.5},
        {"ratios": (0.5, 1.5, 0.1)},
        {"layers": (8, 16)},
        {"layers": (8, 8, 16)},
        {"layers": (16, 8, 24)},
        {"layers": (-1, 8, 16)},
        {"layers": 8},
    ],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        PyramidDrop(**settings)


def test_layer_beyond_the_model_is_refused():
    with pytest.raises(WinnowError, match="32 LM layers"):
        PyramidDrop(layers=(8, 16, 32)).checked_steps(LLAMA)


@pytest.mark.parametrize("content", [256, 576, 2880, 25, 105])
@pytest.mark.parametrize("budget", [13, 64, 192, 320, 640, "12.5%", 1])
def test_at_a_budget_the_last_cut_keeps_exactly_that(budget, content):
    method = PyramidDrop().at_budget(budget, content)
    counts = [ratio.of(content) for ratio in method.ratios]
    assert counts[-1] == (content // 8 if budget == "12.5%" else min(budget, content))
    assert counts == sorted(counts, reverse=True)
    _, found = _chain(method, content)
    assert [held.shape[1] for held in found.values()] == counts
    again = Plan.of(str(Plan((method,)))).methods[0]  # a plan string carries it
    assert [ratio.of(content) for ratio in again.ratios] == counts


def test_at_an_eighth_it_is_the_published_schedule():
    assert [r.of(n) for n in (576, 2880) for r in PyramidDrop().at_budget("12.5%", 576).ratios] == [
        *(288, 144, 72),
        *(1440, 720, 360),
    ]
    assert [r.of(576) for r in PyramidDrop().at_budget(72, 576).ratios] == [288, 144, 72]
    assert PyramidDrop((0.6, 0.3), (3, 9)).at_budget("25%", 100) == PyramidDrop(("50%", "25%"), (3, 9))


def test_a_budget_that_may_leave_nothing():
    counts = [ratio.of(100) for ratio in PyramidDrop().at_budget(Budget(0, allow_empty=True), 100).ratios]
    assert counts[-1] == 0
    assert min(counts) == 0
    assert counts == sorted(counts, reverse=True)
