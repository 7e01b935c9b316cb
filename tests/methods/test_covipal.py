"""CoViPAL by its card: scorers that see all tokens and the question; soft pruning is pruning in the limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from probes import Pick, score

import winnow
from winnow import reference
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.learn.pruners.frozen import soft_keys
from winnow.methods.covipal import CoViPAL, Scorer, sizes_for
from winnow.parts.learned import untrained
from winnow.signals.entering import QuestionRows

from .directional import at_random, evenly, gap
from .stubs import STUBS, first_k, ids, tokens

LLAMA = ModelInfo(depth=8, width=12)


def pruned_softly(model, sample, layer, keep):
    """Logits with the keys of dropped tokens weighing nothing from a layer on."""
    visual = (sample["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0]

    def gate(number, hidden):
        if number != layer:
            return None
        kept = score(hidden[0, visual]).topk(keep).indices
        weights = torch.zeros(len(visual)).index_fill(0, kept, 1.0)
        return torch.zeros(1, hidden.shape[1]).index_copy(1, visual, weights.log()[None])

    with soft_keys(model.model.language_model.layers, gate), torch.no_grad():
        return model(**sample).logits[0, -1]


@pytest.mark.system("covipal", "exact")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "qwen2_5_vl"])
@pytest.mark.parametrize("layer", [0, 2])
def test_gates_of_zero_and_one_are_hard_removal_at_kept_positions(build, layer, implementation):
    model, (sample,) = zoo.model(build), zoo.samples(build, ("3 A 6",))
    model.set_attn_implementation(implementation)
    keep = zoo.tokens_of(build, "A") // 3
    soft = pruned_softly(model, sample, layer, keep)
    with winnow.compress(model, Pick(keep=keep, at=f"layers[{layer}]")) as handle, torch.no_grad():
        hard = model(**sample).logits[0, -1]
        assert len(handle.last.items[0].kept) == keep
        with handle.using("full"):
            assert (hard - model(**sample).logits[0, -1]).abs().max() > 1e-2
    assert (soft - hard).abs().max() <= 1e-4


@pytest.mark.system("covipal", "exact")
def test_open_gates_change_nothing_and_gradients_flow_through_them():
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    model.set_attn_implementation("eager")
    model.requires_grad_(False)
    plain = model(**sample).logits
    weights = torch.zeros(1, sample["input_ids"].shape[1], requires_grad=True)
    with soft_keys(model.model.language_model.layers, lambda number, hidden: weights if number == 1 else None):
        soft = model(**sample).logits
    assert (soft - plain).abs().max() <= 1e-5
    (grad,) = torch.autograd.grad(soft[0, -1].max(), weights)
    assert (grad.abs() > 0).sum() > 20


def test_a_scorer_is_a_quarter_as_wide_as_the_lm_and_not_too_narrow():
    widths = 12, 192, 384, 512, 1024, 4096
    assert [sizes_for(width)["dim"] for width in widths] == [4, 96, 96, 128, 256, 256]
    assert {own.visual.out_features for own in CoViPAL(weights="untrained").resolve(LLAMA).build(LLAMA).values()} == {4}


@pytest.mark.system("covipal", "exact")
def test_all_kept_is_the_identity():
    for step in CoViPAL(ratios=("100%", "100%"), weights="untrained").bind(LLAMA)[1]:
        view = _view(0, 9, step.at.index)
        assert ids(step.act(view, State())[0].reduction) == list(range(9))


def _view(seed, n, layer, module=None, b=1):
    text = torch.randn(b, 32, LLAMA.width, generator=torch.Generator().manual_seed(seed + 99))
    text[:, :20] = 0  # a question of 12 tokens
    view = View.of(tokens(seed, n, LLAMA.width, b), {QuestionRows(layer): text})
    object.__setattr__(view, "module", module or _scorers(layer))
    return view


def _scorers(*layers):
    return untrained(lambda: torch.nn.ModuleDict({str(k): Scorer(LLAMA.width, 16, 4) for k in layers}), 5)


def _keeps_the_best(cut):
    for seed in range(4):
        view = _view(seed, 30, 2)
        rows = view.tokens[0], view[QuestionRows(2)][0, 20:]
        logits = view.module["2"](rows[0][None], rows[1][None])[0]  # without the rows that are not there
        assert ids(cut(view, 7)) == logits.topk(7).indices.sort().values.tolist()


@pytest.mark.system("covipal", "exact")
def test_the_tokens_with_the_best_logits_stay_whatever_pads_the_question():
    _keeps_the_best(lambda view, k: CoViPAL().cut(view, QuestionRows(2), winnow.Budget(k)))


@pytest.mark.parametrize("stub", STUBS)
def test_the_best_logits_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _keeps_the_best(stub)


@pytest.mark.system("covipal", "exact")
def test_scores_depend_on_all_other_tokens_and_on_the_question():
    scorer = _scorers(0)["0"]
    view = _view(1, 10, 0)
    v, t = view.tokens, view[QuestionRows(0)]
    plain = scorer(v, t)
    other = v.clone()
    other[:, 9] = -other[:, 9]
    assert (scorer(other, t)[:, :9] - plain[:, :9]).abs().max() > 1e-4
    assert (scorer(v, -t) - plain).abs().max() > 1e-4


def test_a_tokens_place_in_the_list_does_not_matter():
    scorer = _scorers(0)["0"]
    view, order = _view(2, 20, 0), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved = scorer(view.tokens[:, order], view[QuestionRows(0)])
    assert (moved - scorer(view.tokens, view[QuestionRows(0)])[:, order]).abs().max() <= 1e-5


def test_broken_tokens_are_counted_and_change_nothing_for_the_others():
    view = _view(3, 20, 0)
    clean = ids(
        CoViPAL().cut(
            View(**{**view.__dict__, "tokens": view.tokens.index_fill(1, torch.tensor([4]), 0)}),
            QuestionRows(0),
            winnow.Budget(8),
        )
    )
    view.tokens[0, 4] = torch.nan
    kept = ids(CoViPAL().cut(view, QuestionRows(0), winnow.Budget(8)))
    assert 4 not in kept
    assert len(set(kept) ^ (set(clean) - {4})) <= 1
    assert int(view.notes["nan_scores"]) == 1


@pytest.mark.parametrize(
    ("ratios", "n", "left"), [(("50%", "25%"), 256, (128, 64)), (("50%", "25%"), 27, (13, 6)), ((9, 4), 27, (9, 4))]
)
def test_shares_are_of_the_tokens_at_entry_and_rounded_down(ratios, n, left):
    method = CoViPAL(ratios=ratios)
    for budget, want in zip(method.ratios, left, strict=True):
        view = _view(0, n, 0)
        assert method.cut(view, QuestionRows(0), budget).m == want


def test_cuts_are_at_the_input_and_a_quarter_of_the_depth():
    assert [str(step.at) for step in CoViPAL().bind(LLAMA)[1]] == ["layers[0]", "layers[2]"]
    assert [str(step.at) for step in CoViPAL(ratios=(5,)).bind(LLAMA)[1]] == ["layers[0]"]
    assert [str(step.at) for step in CoViPAL(layers=(1, 5)).bind(LLAMA)[1]] == ["layers[1]", "layers[5]"]
    for layers in ((1,), (2, 2), (3, 1)):
        with pytest.raises(WinnowError, match="2 ascending layers"):
            CoViPAL(layers=layers)


def test_weights_for_other_cuts_are_refused():
    model, processor = reference.load()
    with pytest.raises(WinnowError, match="do not fit"):
        winnow.compress(model, "covipal:layers=[1,3]", processor=processor)


class Deaf(CoViPAL):
    """The scorers without the question."""

    def cut(self, view, text, budget):
        signals = {name: torch.zeros_like(x) for name, x in view.signals.items()}
        return super().cut(replace(view, signals=signals), text, budget)


@pytest.mark.system("covipal", "directional")
@pytest.mark.xdist_group("samples")
def test_trained_scorers_keep_more_answers_than_untrained_ones(sample):
    assert gap(sample.right("covipal"), sample.right("covipal:weights=untrained")).low > 0


@pytest.mark.system("covipal", "directional")
@pytest.mark.xdist_group("samples")
def test_at_the_input_they_keep_more_of_the_evidence_than_blind_choices_and_the_first_layers_attention(sample):
    """A quarter of the tokens, by the first scorer alone."""
    trained = sample.left("covipal:ratios=[64,64]")
    for plan in ("covipal:weights=untrained,ratios=[64,64]", "fastv:layer=1,keep=64"):
        assert gap(trained, sample.left(plan)).low > 0
    for stub in (first_k, evenly, at_random):
        assert gap(trained, sample.recall(sample.kept(stub, 64))).low > 0


@pytest.mark.system("covipal", "directional")
@pytest.mark.xdist_group("samples")
def test_without_the_question_they_keep_less_of_the_evidence(sample):
    deaf = Plan((Deaf(ratios=(64, 64)),), seed=1)  # another key than that of the method itself
    assert gap(sample.left("covipal:ratios=[64,64]"), sample.left(deaf)).low > 0
