"""The shipped video reference model and its card."""

from __future__ import annotations

import json

import pytest
import torch

import winnow
from winnow.learn.clip_evaluate import by_type, draw_sample, under
from winnow.reference import video
from winnow.world.clips import TYPES


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return video.load()


@pytest.fixture(scope="module")
def card():
    return json.loads((video.path() / "card.json").read_text())


def test_the_model_is_small(shipped, card):
    model, _ = shipped
    assert sum(p.numel() for p in model.parameters()) == card["parameters"] <= 15_000_000
    assert sum(p.stat().st_size for p in video.path().glob("*.safetensors")) == card["bytes"] <= 30_000_000


def test_it_answers_through_generate_as_the_card_says(shipped, card):
    """Other clips than the card's, through `generate`: within 3 standard errors of it."""
    model, processor = shipped
    sample = draw_sample(4, seed=50_000)
    right = [video.answer(model, processor, c.pixels, q.text) == q.answer for c, q in sample.flat]
    said = card["accuracy"]["full"]["overall"]
    assert abs(sum(right) / len(right) - said) < 3 * (said * (1 - said) / len(right)) ** 0.5 + 0.02


def test_what_is_learned_needs_the_clip_and_its_order(shipped, card):
    model, _ = shipped
    sample = draw_sample(12, seed=60_000, types=card["learned"])
    full, blind, shuffled = (by_type(sample, under(model, sample, name)) for name in ("full", "blind", "shuffled"))
    assert full["overall"] > blind["overall"] + 0.2
    assert full["overall"] > shuffled["overall"]


def test_the_card_covers_all_types(card):
    for condition in ("full", "blind", "shuffled", "single-frame"):
        assert set(TYPES) <= set(card["accuracy"][condition])
    page = (video.path() / "README.md").read_text()
    for kind in set(TYPES) - set(card["learned"]):
        assert kind in page.split("Not learned: ")[1].split("**")[0]


def test_it_is_compressed_like_any_model(shipped):
    model, processor = shipped
    (drawn,), ((question,),) = (lambda s: (s.clips, s.questions))(draw_sample(1, types=("presence",)))
    given = processor(drawn.pixels, question.text)
    plain = model.generate(**given, max_new_tokens=3, do_sample=False)
    with winnow.compress(model, "divprune:keep=18") as handle:
        model.generate(**given, max_new_tokens=3, do_sample=False)
        assert [len(item.kept) for item in handle.last.items] == [18]
    assert torch.equal(model.generate(**given, max_new_tokens=3, do_sample=False), plain)
