"""Recall under a plan: what `measure` says is what the model itself says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import winnow
from winnow.bench.recall import accuracy, measure, perplexity
from winnow.core.errors import WinnowError
from winnow.reference import text
from winnow.world.recall import draw

TINY = text.config(width=32, layers=2, heads=4, groups=2, inner=32)


@pytest.fixture(scope="module")
def tiny():
    """An untrained model, its weights large enough that its answers differ."""
    torch.set_num_threads(1)
    model = text.make_model(TINY, 3).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def said(model, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    made = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count, do_sample=False
    )
    return tuple(made[0, len(ids) :].tolist())


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("task", ["needle", "pairs", "copy"])
def test_answers_are_those_of_generate(tiny, task, aware):
    found = measure(tiny, "full", task, 10, 128, aware)
    assert [(answer.seed, answer.place) for answer in found] == [(seed, 0) for seed in range(10)]
    for answer in found:
        sample = draw(task, answer.seed, 128, "test")
        assert answer.truth == sample.asked[0].answer
        assert answer.said == said(tiny, sample.context + sample.asked[0].question, len(answer.truth))
    assert len({answer.said for answer in found}) > 1


def test_questions_come_one_after_the_other_or_each_with_its_context(tiny):
    together, apart = (measure(tiny, None, "several", 3, 128, aware, asks=3) for aware in (False, True))
    for seed in range(3):
        sample = draw("several", seed, 128, "test", asks=3)
        read = sample.context
        for place, asked in enumerate(sample.asked):
            one, other = together[3 * seed + place], apart[3 * seed + place]
            read += asked.question
            assert one.said == said(tiny, read, 2)
            assert other.said == said(tiny, sample.context + asked.question, 2)
            assert (
                (one.seed, one.place, one.truth)
                == (other.seed, other.place, other.truth)
                == (
                    seed,
                    place,
                    asked.answer,
                )
            )
            read += one.said


def test_perplexity_is_that_of_the_last_quarter(tiny):
    losses = []
    for seed in range(3):
        ids = torch.tensor([draw("filler", seed, 128, "test").context])
        with torch.no_grad():
            logits = tiny(input_ids=ids).logits
        losses.append(F.cross_entropy(logits[0, 95:-1], ids[0, 96:]).item())
    assert perplexity(tiny, "full", 3, 128) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)


@pytest.mark.parametrize(
    ("task", "n", "said"), [("filler", 2, "asks nothing"), ("novel", 2, "needle, pairs"), ("needle", 0, "at least 1")]
)
def test_what_cannot_be_measured_is_refused(tiny, task, n, said):
    with pytest.raises(WinnowError, match=said):
        measure(tiny, None, task, n, 128)


# 64 texts of 512 words take seconds each; the weights stay as they are, and the card says the same of all three.
@pytest.mark.parametrize(
    ("task", "floor"),
    [
        ("needle", 0.85),
        pytest.param("pairs", 0.8, marks=pytest.mark.full),
        pytest.param("several", 0.7, marks=pytest.mark.full),
    ],
)
def test_the_shipped_model_recalls(task, floor):
    torch.set_num_threads(1)
    model, _ = text.load()
    assert accuracy(measure(model, "full", task, 64, 512)) >= floor


def test_a_cache_made_before_the_question_loses_what_one_made_after_it_keeps():
    torch.set_num_threads(1)
    model, _ = text.load()
    given = {"task": "needle", "n": 24, "length": 256}
    assert measure(model, "snapkv:keep=100%", **given) == measure(model, "full", **given)
    aware, agnostic = (accuracy(measure(model, "snapkv:keep=20%", **given, aware=aware)) for aware in (True, False))
    assert aware > agnostic + 0.1
    assert winnow.handle_of(model) is None


def test_the_shipped_model_reads_its_filler():
    torch.set_num_threads(1)
    model, _ = text.load()
    assert perplexity(model, "full", 8, 128) < 12  # of 62 words


def test_the_shipped_model_is_small():
    model, tokenizer = text.load()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(p.stat().st_size for p in text.path().glob("*.safetensors")) <= 6_000_000
    assert tokenizer.decode(list(draw("needle", 0, 128).asked[0].question)).startswith("? the code of ")
