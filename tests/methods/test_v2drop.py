"""V2Drop: three cuts in the LM, by how much the layer before each has changed a token."""

from __future__ import annotations

import pytest
import torch

from tests.methods.directional import at_random, blind_cuts, evenly, gap
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.v2drop import V2Drop
from winnow.signals.layers import LayerChange
from winnow.testing import Picture

from .stubs import STUBS, ids, scores, tokens

LLAMA = ModelInfo(model="Llama", depth=32)
HALF, QUARTER = V2Drop().ratios[:2]


def _chain(method, varied, info=LLAMA):
    """Ids that are left after each cut; layer k changes token j by `varied[k][:, j]`."""
    b, n = next(iter(varied.values())).shape
    held, found = torch.arange(n).expand(b, n), {}
    for step in method.bind(info)[1]:
        signal = step.needs[0]
        values = {signal: varied[signal.layer].gather(1, held)}
        view = View(tokens(0, held.shape[1], b=b), Layout.grid(1, n), held, n, values)
        held = held.gather(1, step.act(view, State())[0].reduction.index)
        found[step.at.index] = held
    return found


@pytest.mark.system("v2drop", "exact")
@pytest.mark.parametrize("n", [576, 575, 577, 30, 5, 1])
def test_released_code_written_naively(n):
    """Half of what is left, half of that, and one token; sorted back into the order of the picture."""
    varied = {layer: scores(layer, n) for layer in (2, 16, 21)}
    found = _chain(Plan.of("v2drop:released").methods[0], varied)
    held = list(range(n))
    for layer, ratio in ((3, 0.5), (17, 0.5), (22, 0)):
        row = varied[layer - 1][0].tolist()
        held = sorted(sorted(held, key=lambda j: -row[j])[: max(1, int(len(held) * ratio))])
        assert found[layer][0].tolist() == held


def _most_changed(reduce):
    for seed in range(5):
        varied = scores(seed, 30)
        assert ids(reduce(View.of(tokens(0, 30), varied), 15)) == varied[0].topk(15).indices.sort().values.tolist()


@pytest.mark.system("v2drop", "exact")
def test_a_cut_keeps_the_most_changed():
    _most_changed(lambda view, k: V2Drop().cut(view, LayerChange(2), HALF))


@pytest.mark.parametrize("stub", STUBS)
def test_most_changed_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _most_changed(stub)


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
    varied = torch.ones(1, 8)
    assert ids(V2Drop().cut(View.of(tokens(0, 8), varied), LayerChange(2), HALF)) == [0, 1, 2, 3]
    varied[0, [0, 2]] = torch.tensor([torch.nan, torch.inf])
    view = View.of(tokens(0, 8), varied)
    assert ids(V2Drop().cut(view, LayerChange(2), HALF)) == [1, 3, 4, 5]
    assert int(view.notes["nan_scores"]) == 2


def test_tiles_are_one_pool():
    layout, varied = Picture.tiled(4, 2, 1).lm, torch.zeros(1, 48)
    varied[0, 16:28] = 1
    assert ids(V2Drop().cut(View.of(tokens(0, 48), varied, layout=layout), LayerChange(2), QUARTER)) == [*range(16, 28)]


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
