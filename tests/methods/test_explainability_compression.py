"""Explainability compression by its card: the explanation names the tokens that matter, and the net guesses them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import zoo
from byhand import Reference
from probes import Look

import winnow
from winnow import reference
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.learn.pruners.frozen import Example, Frozen, questions, soft_keys
from winnow.learn.pruners.relevance import relevance, rollout, rollout_naive
from winnow.methods.explainability_compression import ExplainabilityCompression, HeadsOfQuestion, Net
from winnow.parts.learned import untrained
from winnow.testing import Picture

from .directional import evenly, gap
from .stubs import STUBS, ids, tokens

HEADS = 3
SEEN = HeadsOfQuestion(0)


def _net(seed=0):
    return untrained(lambda: Net(HEADS, 8), seed)


def _attention(seed, n, b=1):
    return HeadsOfQuestion(0, HEADS).sample(torch.Generator().manual_seed(seed), b, n)


def _view(layout, seen, net=None, left=None):
    n = seen.shape[1]
    every = torch.arange(n).expand(len(seen), -1)
    view = View(tokens(0, n, b=len(seen)), layout, every if left is None else left, layout.n_content, {SEEN: seen})
    object.__setattr__(view, "module", net or _net())
    return view


def _naive(net, seen, h, w):
    """One plane, place by place."""
    x = torch.log2(1 + seen * len(seen)).T.reshape(HEADS, h, w)
    for conv in (net[0], net[2]):
        out = torch.zeros(len(conv.weight), h, w)
        for r in range(h):
            for c in range(w):
                for i in range(3):
                    for j in range(3):
                        near = x[:, min(max(r + i - 1, 0), h - 1), min(max(c + j - 1, 0), w - 1)]
                        out[:, r, c] += conv.weight[:, :, i, j] @ near
        x = torch.nn.functional.gelu(out + conv.bias[:, None, None])
    return (net[4].weight[:, :, 0, 0] @ x.flatten(1))[0] + net[4].bias


def _keeps_the_best(reduce):
    for seed in range(3):
        seen, net = _attention(seed, 30), _net(seed)
        want = _naive(net, seen[0], 5, 6).topk(7).indices.sort().values.tolist()
        assert ids(reduce(_view(Layout.grid(5, 6), seen, net), 7)) == want


@pytest.mark.system("explainability-compression", "exact")
def test_equals_its_convolutions_written_naively():
    _keeps_the_best(lambda view, k: ExplainabilityCompression(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_convolutions_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _keeps_the_best(stub)


@pytest.mark.system("explainability-compression", "exact")
def test_the_net_takes_any_number_of_tokens_and_looks_nearby_only():
    """Fully convolutional: on a larger picture the same surroundings give the same scores."""
    method, net = ExplainabilityCompression(), _net()
    small, large = torch.full((1, 64, HEADS), 1 / 64), torch.full((1, 256, HEADS), 1 / 256)
    mark = torch.tensor([2.0, 0.5, 1.0])
    small[0, 3 * 8 + 4] *= mark
    large[0, 9 * 16 + 6] *= mark
    a = method.score(_view(Layout.grid(8, 8), small, net))[0].reshape(8, 8)
    b = method.score(_view(Layout.grid(16, 16), large, net))[0].reshape(16, 16)
    assert (a[1:6, 2:7] - b[7:12, 4:9]).abs().max() <= 1e-5
    assert (b[0, 0] - b[15, 15]).abs() <= 1e-5


@pytest.mark.system("explainability-compression", "exact")
def test_tiles_and_frames_are_planes_of_their_own():
    method, net, layout = ExplainabilityCompression(), _net(), Picture.tiled(4, 2, 1).lm
    seen = _attention(1, layout.n_content)
    scores = method.score(_view(layout, seen, net))[0]
    other = seen.clone()
    other[0, 16:] = 0
    assert torch.equal(method.score(_view(layout, other, net))[0, :16], scores[:16])
    video = Layout.grid(3, 4, 2)
    seen = _attention(2, 24)
    both = method.score(_view(video, seen, net))[0]
    seen[0, 12:] = 0
    assert torch.equal(method.score(_view(video, seen, net))[0, :12], both[:12])


def test_after_an_earlier_method_absent_tokens_have_no_attention():
    layout, left = Layout.grid(4, 5), torch.tensor([[0, 3, 4, 9, 11, 12, 19]])
    seen = _attention(3, 7)
    whole = torch.zeros(1, 20, HEADS).index_copy(1, left[0], seen)
    method = ExplainabilityCompression()
    scores = method.score(_view(layout, seen, left=left))
    assert (scores - method.score(_view(layout, whole))[:, left[0]]).abs().max() <= 1e-6


def test_broken_attention_is_not_kept_and_spoils_no_neighbour():
    seen = _attention(4, 30)
    clean = ExplainabilityCompression().score(_view(Layout.grid(5, 6), seen.index_fill(1, torch.tensor([8]), 0)))
    seen[0, 8, 1] = torch.nan
    view = _view(Layout.grid(5, 6), seen)
    assert 8 not in ids(ExplainabilityCompression(keep=29).reduce(view))
    rest = torch.arange(30) != 8
    assert torch.equal(ExplainabilityCompression().score(view)[:, rest], clean[:, rest])
    assert int(view.notes["nan_scores"]) == 1


@pytest.mark.system("explainability-compression", "exact")
def test_what_is_kept_depends_on_the_question():
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    other = {**sample, "input_ids": sample["input_ids"].clone()}
    other["input_ids"][0, -4:] = torch.tensor([17, 31, 170, 77])
    kept = []
    with winnow.compress(model, "explainability-compression:keep=8,weights=untrained") as handle, torch.no_grad():
        for inputs in (sample, other):
            model(**inputs)
            kept.append(handle.last.items[0].kept.tolist())
    assert kept[0] != kept[1]


def test_each_head_of_the_first_layer_is_seen_before_it_runs():
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    by_hand, look = Reference(model), Look(needs=(SEEN,), at="projected")
    with winnow.compress(model, look), torch.no_grad():
        model(**sample)
        seen = look.seen(SEEN)[0]
    entry = by_hand.entry(sample)
    weights = by_hand.lm_attention(0, by_hand.run(entry).layers[0], entry)
    want = weights[:, int(entry.items[-1][-1]) + 1 :].mean(1)[:, entry.content[0]]
    assert (seen - want.T).abs().max() <= 1e-6


def test_rolling_out_one_row_equals_rolling_out_all():
    generator = torch.Generator().manual_seed(0)
    attention = [torch.rand(2, 9, 9, generator=generator).tril() for _ in range(4)]
    gradients = [torch.randn(2, 9, 9, generator=generator) for _ in range(4)]
    assert torch.allclose(rollout(attention, gradients), rollout_naive(attention, gradients), rtol=1e-5)


def test_rolling_out_at_a_layer_nobody_reads_changes_nothing():
    attention = [torch.eye(5)[None], torch.zeros(1, 5, 5)]
    assert rollout(attention, [torch.zeros(1, 5, 5)] * 2).tolist() == [0, 0, 0, 0, 1]


@dataclass
class Case:
    """A question, and how much each visual token explains the model's answer to it."""

    frozen: Frozen
    example: Example
    visual: torch.Tensor
    why: torch.Tensor
    said: int

    @torch.no_grad()
    def answer_without(self, hidden):
        """The probability of the model's answer when these visual tokens are hidden from all layers."""
        gone = self.visual[hidden]

        def gate(number, states):
            return torch.zeros(1, states.shape[1]).index_fill(1, gone, -torch.inf) if number == 0 else None

        with soft_keys(self.frozen.handle.bound.layers, gate):
            return self.frozen.run(self.example).logits[0, -1].softmax(-1)[self.said].item()


CASES, HIDDEN = 20, 32  # questions, and tokens of 256


@pytest.fixture(scope="module")
def explained():
    """Questions, and what is left of the answer when the least relevant tokens are hidden, or as many at random."""
    model, processor = reference.load()
    model.set_attn_implementation("eager")
    drawn = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:HIDDEN]
    with winnow.compress(model, Plan(()), processor=processor) as handle:
        frozen, cases = Frozen(handle, processor, questions(CASES, seed=999)), []
        for example in frozen.examples(0, CASES):
            visual, _ = frozen.slots(example)
            said = []

            def forward(example=example, said=said):
                output = frozen.run(example, output_attentions=True)
                said.append(int(output.logits[0, -1].argmax()))
                return output

            cases.append(Case(frozen, example, visual, relevance(model, visual, forward), said[0]))
        last = [case.answer_without(case.why.argsort()[:HIDDEN]) for case in cases]
        yield cases, last, [case.answer_without(drawn) for case in cases]


def _explains(explained, order):
    """Hiding an eighth of the tokens that comes first in an order costs more of the answer than any other eighth."""
    cases, last, drawn = explained
    first = [case.answer_without(order(case.why)[:HIDDEN]) for case in cases]
    assert gap(last, first).low > 0
    assert gap(drawn, first).low > 0


@pytest.mark.system("explainability-compression", "directional")
@pytest.mark.xdist_group("samples")
def test_hiding_what_explains_the_answer_takes_it_away(explained):
    _explains(explained, lambda why: why.argsort(descending=True))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", STUBS)
def test_hiding_fails_for_a_stub(explained, stub):
    with pytest.raises(AssertionError):
        _explains(explained, lambda why: torch.tensor(ids(stub(View.of(torch.zeros(1, 256, 1)), HIDDEN))))


SLUG = "explainability-compression"


@pytest.mark.system(SLUG, "directional")
@pytest.mark.xdist_group("samples")
def test_the_trained_net_keeps_more_evidence_than_an_untrained_one_and_than_raw_attention(sample):
    trained = sample.left(f"{SLUG}:keep=25%")
    assert gap(trained, sample.left(f"{SLUG}:keep=25%,weights=untrained")).low > 0
    assert gap(trained, sample.left("fastv:layer=1,keep=25%")).low > 0
    assert gap(trained, sample.recall(sample.kept(evenly, 64))).low > 0
