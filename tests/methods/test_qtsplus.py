"""QTSplus by its card: scores of the question, as many tokens as are predicted, and what is kept sees itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu

from winnow.contract import Emit, Layout, ModelInfo, QuestionTokens, Reduction, View, WinnowError
from winnow.core.step import State
from winnow.learn.connectors.clips import Row
from winnow.learn.connectors.qtsplus import Recipe
from winnow.methods.qtsplus import QTSplus
from winnow.parts.finite import finite
from winnow.parts.learned import untrained
from winnow.parts.query_aware import Tokenizer

from . import connectors
from .directional import gap
from .stubs import STUBS, ids, tokens

INFO = ModelInfo(width=32, heads=4)
QUESTION = QuestionTokens()


def module(seed: int = 3) -> Tokenizer:
    return untrained(lambda: Tokenizer(32, 4, 16, 1), seed)


def view_of(
    seed: int = 0, n: int = 40, b: int = 1, layout: Layout | None = None, made: Tokenizer | None = None
) -> View:
    question = 2 * tokens(seed + 50, 6, 32, b)
    view = View.of(2 * tokens(seed, n, 32, b), {QUESTION: question}, layout=layout)
    object.__setattr__(view, "module", made or module())
    return view


def act(view: View, **settings) -> Reduction | Emit:
    step = QTSplus(weights="untrained", **settings).bind(INFO)[1][0]
    action = step.act(view, State())[0]
    return action if isinstance(action, Emit) else action.reduction


def attention_naive(own: Tokenizer, view: View, lane: int = 0) -> list[float]:
    """The most that a head of a token of the question attends to each token, with loops."""
    text, x = (normed(part[lane].double()) for part in (view[QUESTION], view.tokens))
    q, k = (
        x_ @ layer.weight.double().T + layer.bias.double() for x_, layer in ((text, own.scorer.q), (x, own.scorer.k))
    )
    best = [0.0] * len(x)
    for head in torch.arange(32).chunk(4):
        for row in q[:, head]:
            powers = [math.exp(float(row @ key) / len(head) ** 0.5) for key in k[:, head]]
            best = [max(old, power / sum(powers)) for old, power in zip(best, powers, strict=True)]
    return best


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _keeps_the_most_attended(choose) -> None:
    for seed in range(4):
        view = view_of(seed)
        r = attention_naive(view.module, view)
        want = sorted(sorted(range(40), key=lambda j: -r[j])[:9])
        assert ids(choose(view, 9)) == want


@pytest.mark.system("qtsplus", "exact")
def test_what_the_question_attends_to_most_stays_in_order():
    _keeps_the_most_attended(lambda view, k: act(view, keep=k, reencode=False))
    _keeps_the_most_attended(lambda view, k: act(view, keep=k).provenance)


@pytest.mark.parametrize("stub", STUBS)
def test_what_it_attends_to_is_not_what_a_stub_keeps(stub):
    with pytest.raises(AssertionError):
        _keeps_the_most_attended(stub)


@pytest.mark.system("qtsplus", "exact")
def test_everything_kept_as_it_is_is_the_identity():
    view = view_of()
    found = act(view, least=1, most=1, cap=40, reencode=False)
    assert ids(found) == list(range(40))
    assert torch.equal(found.apply(view.tokens), view.tokens)


def predicted_naive(view: View, least: float, most: float, cap: int) -> int:
    own = view.module.share
    r = torch.tensor(attention_naive(view.module, view))
    p = r / r.sum()
    known = torch.tensor([math.log(view.n), float(r.max()), -float((p * p.log()).sum())])
    logit = own.down(gelu(own.up(torch.cat([view[QUESTION][0].mean(0), known]))))
    return min(cap, max(1, math.ceil((least + (most - least) * float(logit.sigmoid())) * view.n)))


@pytest.mark.system("qtsplus", "exact")
def test_as_many_stay_as_are_predicted():
    counts = set()
    for seed in range(8):
        view = view_of(seed, made=module(seed))
        count = predicted_naive(view, 0.05, 0.5, 2560)
        assert act(view).provenance.m == count
        counts.add(count)
    assert len(counts) > 2  # it is a prediction, and no number
    view = view_of(1)
    assert act(view, cap=3).provenance.m == 3
    assert act(view, least=0, most=0).provenance.m == 1
    assert act(view, keep=0.21).provenance.m == 9  # rounded up


@pytest.mark.system("qtsplus", "exact")
def test_another_question_keeps_others():
    view = view_of()
    other = View.of(view.tokens, {QUESTION: 2 * tokens(99, 6, 32)})
    object.__setattr__(other, "module", view.module)
    first, second = (set(ids(act(own, keep=10, reencode=False))) for own in (view, other))
    assert len(first & second) / len(first | second) < 0.7


@pytest.mark.system("qtsplus", "exact")
def test_items_of_a_batch_keep_as_many_as_alone():
    made = module(0)
    view = view_of(3, b=4, made=made)
    found = act(view, least=0.05, most=1)
    assert len(set(found.provenance.counts)) > 1
    for lane in range(4):
        alone = View.of(view.tokens[lane : lane + 1], {QUESTION: view[QUESTION][lane : lane + 1]})
        object.__setattr__(alone, "module", made)
        own = act(alone, least=0.05, most=1)
        assert ids(found.provenance, lane) == ids(own.provenance)
        assert (found.tokens[lane, : own.provenance.m] - own.tokens[0]).abs().max() <= 1e-5


def encoded_naive(view: View, kept: list[int], time: bool) -> torch.Tensor:
    """One block over what is kept, head by head."""
    block, width = view.module.blocks[0], 32
    frames = torch.tensor(view.layout.place[view.layout.content][:, 1])[kept]
    half = torch.tensor([10000 ** (-i / 16) for i in range(16)])
    waves = torch.cat([(frames[:, None] * half).sin(), (frames[:, None] * half).cos()], 1) * time
    x = view.tokens[0, kept]
    q, k, v = block.qkv(normed(x) + waves).split(width, 1)
    heads = [(q[:, at] @ k[:, at].T / 8**0.5).softmax(-1) @ v[:, at] for at in torch.arange(width).chunk(4)]
    x = x + block.out(torch.cat(heads, 1))
    return x + block.down(gelu(block.up(normed(x))))


@pytest.mark.system("qtsplus", "exact")
@pytest.mark.parametrize("time", [True, False])
def test_what_is_kept_is_encoded_again(time):
    view = view_of(layout=Layout.grid(2, 4, 5))
    found = act(view, keep=12, time=time)
    want = encoded_naive(view, ids(found.provenance), time)
    assert (found.tokens[0] - want).abs().max() <= 1e-5
    assert (found.tokens[0] - found.provenance.apply(view.tokens)[0]).abs().max() > 0.1


def test_only_time_tells_frames_apart():
    first, second = view_of(layout=Layout.grid(2, 4, 5)), view_of(layout=Layout.grid(5, 8))
    for time, apart in ((True, True), (False, False)):
        a, b = (act(view, keep=12, time=time).tokens for view in (first, second))
        assert ((a - b).abs().max() > 1e-3) == apart


@pytest.mark.system("qtsplus", "exact")
def test_as_released_blocks_know_no_time():
    """The authors' code: the most attended tokens in order, and blocks without any position."""
    view = view_of(layout=Layout.grid(2, 4, 5))
    step = QTSplus.as_released(weights="untrained").bind(INFO)[1][0]
    found = step.act(view, State())[0]
    r = attention_naive(view.module, view)
    count = predicted_naive(view, 0.05, 0.5, 2560)
    kept = sorted(sorted(range(40), key=lambda j: -r[j])[:count])
    assert ids(found.provenance) == kept
    assert (found.tokens[0] - encoded_naive(view, kept, time=False)).abs().max() <= 1e-5


def test_broken_tokens_stay_last_and_spoil_nothing():
    view = view_of()
    view.tokens[0, 7], view.tokens[0, 9, 3] = torch.nan, torch.inf
    found = act(view, keep=20)
    assert not {7, 9} & set(ids(found.provenance))
    assert found.tokens.isfinite().all()
    assert int(view.notes["nan_scores"]) == 2
    assert act(view, keep=40).tokens.isfinite().all()


def test_equal_tokens_stay_from_the_first_on():
    view = view_of()
    flat = View.of(torch.ones_like(view.tokens), {QUESTION: view[QUESTION]})
    object.__setattr__(flat, "module", view.module)
    assert ids(act(flat, keep=5, reencode=False)) == [0, 1, 2, 3, 4]


def test_half_precision_keeps_what_single_precision_keeps():
    view = view_of(b=2)
    half = View.of(view.tokens.bfloat16(), {QUESTION: view[QUESTION].bfloat16()})
    single = View.of(half.tokens.float(), {QUESTION: half[QUESTION].float()})
    for own in (half, single):
        object.__setattr__(own, "module", view.module)
    found, want = (act(own, keep=9) for own in (half, single))
    assert torch.equal(found.provenance.index, want.provenance.index)
    assert found.tokens.dtype == torch.bfloat16
    assert (found.tokens.float() - want.tokens).abs().max() <= 0.02 * want.tokens.abs().max()


def test_wrong_settings_are_refused():
    for settings in ({"least": 0.6}, {"least": -1}, {"most": 2}, {"cap": 0}):
        with pytest.raises(WinnowError, match=r"allowed|least"):
            QTSplus(**settings)


@pytest.mark.system("qtsplus", "directional")
@pytest.mark.xdist_group("connectors")
def test_trained_it_answers_more_than_untrained_and_than_as_many_tokens_of_whole_seconds():
    found = connectors.of_method("qtsplus", keep=9)
    assert found.tokens == found.frame_tokens == 9
    assert found.over_untrained.low > 0
    assert found.over_frames.low > 0


def found_of_evidence(rows) -> np.ndarray:
    """The share of each row's evidence among the tenth of the tokens that scores most."""
    own = Recipe(connectors.frozen())
    made = own.method.replace(weights=None).build(connectors.frozen().info)
    shares = []
    for row, (_, mask) in zip(rows, connectors.with_evidence(), strict=True):
        ((_, view),) = connectors.frozen().views([row], own.step, made)
        r = own.method.scores(view, *finite(view.tokens))[0]
        shares.append(mask[r.topk(7).indices.numpy()].sum() / min(7, mask.sum()))
    return np.array(shares)


@pytest.mark.system("qtsplus", "directional")
@pytest.mark.xdist_group("connectors")
def test_its_scores_find_what_the_question_is_about_and_not_what_another_is_about():
    rows = [row for row, _ in connectors.with_evidence()]
    others = [Row(row.tokens, other.asked) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
    assert gap(found_of_evidence(rows), found_of_evidence(others)).low > 0
    for stub in STUBS:
        kept = [ids(stub(View.of(row.tokens[None]), 7)) for row in rows]
        blind = [m[own].sum() / min(7, m.sum()) for own, (_, m) in zip(kept, connectors.with_evidence(), strict=True)]
        assert gap(found_of_evidence(rows), np.array(blind)).low > 0
