"""V2Drop: three cuts in the LM, by how much the layer before each has changed a token."""

from __future__ import annotations

import pytest
import torch

from tests.methods.directional import at_random, blind_cuts, evenly, gap
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.v2drop import V2Drop
from winnow.signals.layers import LayerChange

from .stubs import (
    STUBS,
    chain,
    check_keeps_largest,
    check_ties_and_broken_values,
    check_tiles_are_one_pool,
    ids,
    scores,
    tokens,
)

LLAMA = ModelInfo(model="Llama", depth=32)
HALF, QUARTER = V2Drop().ratios[:2]


@pytest.mark.system("v2drop", "exact")
@pytest.mark.parametrize("n", [576, 575, 577, 30, 5, 1])
def test_released_code_written_naively(n):
    """Half of what is left, half of that, and one token; sorted back into the order of the picture."""
    varied = {layer: scores(layer, n) for layer in (2, 16, 21)}
    found = chain(Plan.of("v2drop:released").methods[0], varied, LLAMA)
    held = list(range(n))
    for layer, ratio in ((3, 0.5), (17, 0.5), (22, 0)):
        row = varied[layer - 1][0].tolist()
        held = sorted(sorted(held, key=lambda j: -row[j])[: max(1, int(len(held) * ratio))])
        assert found[layer][0].tolist() == held


def choose(view, k):
    return V2Drop().cut(view, LayerChange(2), Budget(k))


@pytest.mark.system("v2drop", "exact")
def test_a_cut_keeps_the_most_changed():
    check_keeps_largest(choose)


@pytest.mark.parametrize("stub", STUBS)
def test_most_changed_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        check_keeps_largest(stub)


@pytest.mark.system("v2drop", "exact")
def test_the_place_of_a_token_does_not_matter():
    """What is kept moves with the tokens."""
    varied, order = scores(3, 40), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    plain = ids(V2Drop().cut(View.of(tokens(0, 40), varied), LayerChange(2), QUARTER))
    moved = ids(V2Drop().cut(View.of(tokens(0, 40), varied[:, order]), LayerChange(2), QUARTER))
    assert sorted(order[moved].tolist()) == plain


@pytest.mark.system("v2drop", "exact")
def test_the_signal_is_the_norm_of_the_difference():
    class Seen:
        before, after = tokens(0, 9, 8, b=2), tokens(1, 9, 8, b=2)

    want = [[sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) ** 0.5 for x, y in zip(a, b, strict=True)]
            for a, b in zip(Seen.before.tolist(), Seen.after.tolist(), strict=True)]  # fmt: skip
    torch.testing.assert_close(LayerChange(0).read(Seen), torch.tensor(want))


def test_ties_nan_and_infinite_values():
    check_ties_and_broken_values(choose)


def test_tiles_are_one_pool():
    check_tiles_are_one_pool(choose)


def test_counts_are_of_what_entered_the_lm():
    view = View.of(tokens(0, 20), scores(0, 20), n_visual=80, n_lm=30)
    assert V2Drop().cut(view, LayerChange(2), HALF).m == 15


@pytest.mark.parametrize(("depth", "layers"), [(32, [3, 17, 22]), (28, [2, 14, 19]), (8, [1, 4, 5]), (4, [1, 2])])
def test_cuts_at_any_depth_look_at_the_layer_before(depth, layers):
    steps = V2Drop().bind(ModelInfo(depth=depth))[1]
    assert [step.at.index for step in steps] == layers
    assert [step.needs for step in steps] == [(LayerChange(layer - 1),) for layer in layers]


@pytest.mark.parametrize("settings", [{"ratios": (0.5,)}, {"layers": (3, 17)}, {"layers": (0, 3, 5)}, {"ratios": ()}])
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        V2Drop(**settings)


def test_at_a_budget():
    method = V2Drop().at_budget("12.5%", 576)
    assert [cut.of(576) for cut in method.ratios] == [288, 144, 72]
    assert Plan.of(str(Plan((method,)))).methods[0] == method


def _finds_evidence(sample, plan):
    """More of the evidence than of random tokens, 32 left behind the third of eight layers."""
    assert gap(sample.left(plan), sample.left(blind_cuts(at_random, (3,), (32,)))).low > 0


@pytest.mark.system("v2drop", "directional")
@pytest.mark.xdist_group("samples")
def test_what_a_middle_layer_changes_is_evidence(sample):
    _finds_evidence(sample, V2Drop(ratios=("12.5%",), layers=(3,)))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [evenly, at_random])
def test_finding_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _finds_evidence(sample, blind_cuts(stub, (3,), (32,)))
