"""TransPrune by its card: three cuts in the LM, by how far layers move a token and how much the text looks at it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.directional import at_random, blind_cuts, evenly, gap
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.transprune import TransPrune
from winnow.signals.language import LMAttention
from winnow.signals.layers import TokenTransition, transition
from winnow.signals.words import WordAttention

from .stubs import STUBS, check_tiles_are_one_pool, ids, scores, tokens

LLAMA = ModelInfo(model="Llama", depth=32)
EVERY = torch.ones(1, 12, dtype=torch.bool)
MOVED, LOOKS = (TokenTransition(6),), (LMAttention(7, "question"),)
MOST, SOME, FEW = TransPrune().ratios


def _norm(x):
    return math.sqrt(sum(v * v for v in x))


def _naive_transition(before, after):
    """The released code for one sequence, over lists."""
    cosine = [
        sum(a * b for a, b in zip(u, o, strict=True)) / (_norm(u) * _norm(o))
        for u, o in zip(before, after, strict=True)
    ]
    turn = [math.exp(1 - c) for c in cosine]
    return [_norm(o) / _norm(u) * t / sum(turn) for u, o, t in zip(before, after, turn, strict=True)]


def _moves(read):
    for seed in range(4):
        u, o = tokens(seed, 12, 6), tokens(seed + 9, 12, 6)
        want = torch.tensor([_naive_transition(u[0].tolist(), o[0].tolist())])
        torch.testing.assert_close(read(u, o), want)


@pytest.mark.system("transprune", "exact")
def test_transition_written_naively():
    _moves(lambda u, o: transition(u, o, EVERY))


@pytest.mark.parametrize("stub", [lambda u, o: o.norm(dim=-1) / u.norm(dim=-1) / 12, lambda u, o: u.norm(dim=-1)])
def test_transition_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _moves(stub)


@pytest.mark.system("transprune", "exact")
def test_transition_moves_with_its_tokens_and_is_uniform_for_a_scaling():
    u, o = tokens(0, 12, 6), tokens(1, 12, 6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transition(u, o, EVERY)[:, order], transition(u[:, order], o[:, order], EVERY))
    torch.testing.assert_close(transition(u, 3 * u, EVERY), torch.full((1, 12), 3 / 12))
    padded = torch.cat([tokens(5, 4, 6), u], 1), torch.cat([tokens(6, 4, 6), o], 1)
    real = torch.arange(16)[None] >= 4
    torch.testing.assert_close(transition(*padded, real)[:, 4:], transition(u, o, EVERY))


def _released(text, n, seed):
    """Ids after each cut of `:released`, and after those of the released code over lists."""
    words = 5
    moved = {layer: scores(seed + layer, n) for layer in range(6, 12)}
    looks = {layer: torch.rand(1, n, words, generator=torch.Generator().manual_seed(layer)) for layer in (7, 9, 12)}
    held, found = torch.arange(n)[None], []
    for step in Plan.of(text).methods[0].bind(LLAMA)[1]:
        values = {
            signal: (moved if isinstance(signal, TokenTransition) else looks)[signal.layer][:, held[0]]
            for signal in step.needs
        }
        view = View(tokens(0, held.shape[1], 4), Layout.grid(1, n), held, n, values)
        held = held.gather(1, step.act(view, State())[0].reduction.index)
        found.append(held[0].tolist())
    naive, left = [], list(range(n))
    for layer, ratio in ((7, 0.875), (9, 0.625), (12, 0.125)):
        own = [sum(float(moved[i][0, j]) for i in range(6, layer)) for j in left]
        seen = [float(looks[layer][0, j].mean()) for j in left]
        score = [a / (sum(own) + 1e-8) + b / (sum(seen) + 1e-8) for a, b in zip(own, seen, strict=True)]
        best = sorted(range(len(left)), key=lambda i: -score[i])[: int(n * ratio)]
        left = sorted(left[i] for i in best)
        naive.append(left)
    return found, naive


@pytest.mark.system("transprune", "exact")
@pytest.mark.parametrize("n", [576, 100, 57])
def test_released_code_written_naively(n):
    for seed in (0, 100):
        found, naive = _released("transprune:released", n, seed)
        assert found == naive


def _both(reduce):
    for seed in range(5):
        moved, looked = scores(seed, 40), scores(seed + 9, 40)
        score = moved / moved.sum() + looked / looked.sum()
        view = View.of(tokens(0, 40), {MOVED[0]: moved, LOOKS[0]: looked})
        assert ids(reduce(view, 5)) == score[0].topk(5).indices.sort().values.tolist()


@pytest.mark.system("transprune", "exact")
def test_both_count_alike_whatever_their_scale():
    _both(lambda view, k: TransPrune().cut(view, MOVED, LOOKS, FEW))


@pytest.mark.parametrize(
    "stub", [*STUBS, lambda view, k: TransPrune().cut(view, MOVED, (), FEW)], ids=["first", "uniform", "movement alone"]
)
def test_both_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _both(stub)


@pytest.mark.system("transprune", "exact")
@pytest.mark.parametrize(("n", "counts"), [(576, [504, 360, 72]), (575, [503, 359, 71]), (30, [26, 18, 3])])
def test_counts_are_cut_off(n, counts):
    view = View.of(tokens(0, n, 4), {MOVED[0]: scores(0, n), LOOKS[0]: scores(1, n)})
    assert [TransPrune().cut(view, MOVED, LOOKS, budget).m for budget in (MOST, SOME, FEW)] == counts
    assert TransPrune(ratios=("100%",), layers=(3,)).ratios[0].of(n) == n


def test_what_is_summed_and_who_looks():
    steps = TransPrune().bind(LLAMA)[1]
    assert [step.at.index for step in steps] == [7, 9, 12]
    for step in steps:
        layer = step.at.index
        assert step.needs == (*map(TokenTransition, range(6, layer)), LMAttention(layer, "question"))
    steps = TransPrune(suffix=True).bind(LLAMA)[1]
    assert [step.needs[-1] for step in steps] == [WordAttention(layer, "all") for layer in (7, 9, 12)]
    steps = TransPrune(attention=False, start=2).bind(LLAMA)[1]
    assert steps[0].needs == tuple(map(TokenTransition, range(2, 7)))
    assert [step.at.index for step in TransPrune().bind(ModelInfo(depth=8))[1]] == [1, 2, 3]


def test_broken_values_are_not_kept_and_do_not_spoil_the_others():
    moved, looked = scores(0, 16), scores(1, 16)
    moved[0, [1, 5]] = torch.tensor([torch.nan, torch.inf])
    looked[0, 7] = torch.nan
    view = View.of(tokens(0, 16), {MOVED[0]: moved, LOOKS[0]: looked})
    kept = ids(TransPrune().cut(view, MOVED, LOOKS, SOME))
    whole = [j for j in range(16) if j not in (1, 5, 7)]
    good = moved[0, whole] / moved[0, [j for j in range(16) if j not in (1, 5)]].sum()
    good = good + looked[0, whole] / looked[0, [j for j in range(16) if j != 7]].sum()
    assert kept == [whole[i] for i in good.topk(10).indices.sort().values]
    assert int(view.notes["nan_scores"]) == 3


def test_half_precision_is_summed_in_single():
    moved = tuple(map(TokenTransition, range(6, 12)))
    values = {signal: (scores(signal.layer, 200) + 8).bfloat16() for signal in moved}
    half = TransPrune().cut(View.of(tokens(0, 200), values), moved, (), SOME)
    single = TransPrune().cut(View.of(tokens(0, 200), {s: v.float() for s, v in values.items()}), moved, (), SOME)
    assert ids(half) == ids(single)


def test_tiles_are_one_pool():
    check_tiles_are_one_pool(lambda view, k: TransPrune().cut(view, MOVED, (), Budget(k)))


@pytest.mark.parametrize(
    "settings", [{"ratios": (0.5,)}, {"layers": (7, 9)}, {"layers": (0, 3, 5)}, {"start": -1}, {"ratios": ()}]
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        TransPrune(**settings)


def test_sums_begin_before_the_first_cut():
    with pytest.raises(WinnowError, match="allowed: a layer before 7"):
        TransPrune(start=7).bind(LLAMA)


def test_at_a_budget():
    method = TransPrune().at_budget("12.5%", 576)
    assert [cut.of(576) for cut in method.ratios] == [504, 360, 72]
    method = TransPrune(attention=False).at_budget(32, 256)
    assert method.ratios[-1].of(256) == 32
    assert Plan.of(str(Plan((method,)))).methods[0] == method


CUTS = {"layers": (1, 2, 3), "keep": (224, 160, 32)}  # those of 12.5 % on the reference model's 8 layers


def _finds_and_answers(sample, plan):
    """More of the evidence, and more right answers, than of random tokens in the same cuts."""
    blind = blind_cuts(at_random, **CUTS)
    assert gap(sample.left(plan), sample.left(blind)).low > 0
    assert gap(sample.right(plan), sample.right(blind)).low > 0


@pytest.mark.system("transprune", "directional")
@pytest.mark.xdist_group("samples")
def test_movement_and_attention_find_the_evidence(sample):
    """As released: the words of the chat template look as well; without them it is not shown (see the findings)."""
    method = TransPrune(suffix=True).at_budget(32, 256)
    cuts = method.bind(sample.handle.info)[0]
    assert (cuts.layers, tuple(ratio.of(256) for ratio in cuts.ratios)) == tuple(CUTS.values())
    _finds_and_answers(sample, method)


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [evenly, at_random])
def test_finding_fails_for_a_stub(sample, stub):
    with pytest.raises(AssertionError):
        _finds_and_answers(sample, blind_cuts(stub, **CUTS))
