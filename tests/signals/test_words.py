"""Raters and the attention of words, on plain tensors; on models they are compared by the methods that use them."""

from __future__ import annotations

import math

import pytest
import torch

from winnow.core.packing import Packing
from winnow.signals.language import LayerModules, LMAttention, LMAttentionInputs, TextSpans
from winnow.signals.words import TextRaters, WordAttention, raters, text_of


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _raters(words, picture):
    """Over lists."""
    t = len(words)
    mean = [0.0] * t
    for x in picture:
        products = [sum(a * b for a, b in zip(x, word, strict=True)) for word in words]
        weights = [math.exp(p - max(products)) for p in products]
        mean = [m + w / sum(weights) / len(picture) for m, w in zip(mean, weights, strict=True)]
    return [m > sum(mean) / t for m in mean]


@pytest.mark.system("sparsevlm", "exact")
def test_raters_written_naively():
    for seed in range(6):
        words, picture = _random(9, 6, seed=seed), _random(30, 6, seed=seed + 50)
        found = raters(words, picture, torch.ones(9, dtype=torch.bool))
        assert found.tolist() == _raters(words.tolist(), picture.tolist())
        assert found.any()
        assert not found.all()


def test_where_no_word_is_above_the_mean_all_are_raters():
    real = torch.tensor([True, True, True, False])
    assert raters(torch.ones(4, 6), _random(5, 6), real).tolist() == real.tolist()
    assert raters(_random(1, 6), _random(5, 6), real[:1]).tolist() == [True]


def _batch(right=False):
    """Two rows of 2 + 4 picture + 3 text tokens, and of 1 + 4 + 2, padded on one side."""
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 7:] = False
    if not right:
        mask = mask.flip(1)
    ends = [6, 5] if right else [6, 7]
    questions = [(6, 8), (5, 7)] if right else [(6, 8), (7, 9)]  # of the first, the last word is the template's
    items = [torch.arange(2, 6), torch.arange(ends[1] - 4, ends[1])]
    return Packing.of(mask, (9, 7), right), TextSpans(questions, ends, items)


@pytest.mark.parametrize("right", [False, True])
def test_the_text_of_each_row(right):
    packing, spans = _batch(right)
    slots, real = text_of(packing, spans, "question")
    assert [s.tolist() for s in slots] == [list(range(*q)) for q in spans.questions]
    assert real.tolist() == [[True, True]] * 2
    slots, real = text_of(packing, spans, "all")
    assert slots[0].tolist() == [6, 7, 8]
    assert real.sum(1).tolist() == [3, 2]
    assert slots[1][:2].tolist() == list(range(*spans.questions[1]))
    _, real = text_of(packing, TextSpans(spans.questions, spans.ends, [spans.items[0], torch.arange(0)]), "all")
    assert real.sum(1).tolist() == [3, 0]


@pytest.mark.parametrize("right", [False, True])
def test_signals_of_a_padded_batch_are_those_of_its_rows(right):
    packing, spans = _batch(right)
    hidden, q, k = _random(2, 9, 6), _random(2, 4, 9, 8, seed=1), _random(2, 2, 9, 8, seed=2)
    seen = LayerModules(hidden, hidden, (hidden, hidden), (hidden, hidden), packing.mask, packing, spans)
    attention = LMAttentionInputs(q, k, 0.3, packing, None, spans)
    found = WordAttention(1, "all").read(attention)
    assert found.shape == (2, 9, 3 if not right else 4)
    for b, text in enumerate(([6, 7, 8], list(range(*spans.questions[1])))):
        own = hidden[b, text], hidden[b, spans.items[b]]
        rated = TextRaters(0, "all").read(seen)[b]
        assert rated[: len(text)].tolist() == [float(r) for r in _raters(*(x.tolist() for x in own))]
        assert not rated[len(text) :].any()
        for number, slot in enumerate(text):
            first = int(packing.mask[b].int().argmax())
            logits = torch.einsum("hd,hnd->hn", q[b, :, slot], k[b].repeat_interleave(2, 0)[:, first : slot + 1]) * 0.3
            torch.testing.assert_close(found[b, first : slot + 1, number], logits.softmax(-1).mean(0))
        assert not found[b, :, len(text) :].any()
    torch.testing.assert_close(
        WordAttention(1, "question").read(attention).mean(-1)[:, 2:6],
        LMAttention(1, "question").read(attention)[:, 2:6],
    )
