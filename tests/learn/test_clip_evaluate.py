"""Conditions and choices of the video reference model's evaluation, and its card."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.learn import clip_evaluate, video_card
from winnow.learn.clip_evaluate import by_type, draw_sample, layout_of, majority, relation_gap, seen_under, under
from winnow.reference import video as reader
from winnow.world.clips import TYPES, ClipQuestion, ClipSpec, clip, stretches

TINY = reader.config(width=48, depth=2, tower_heads=2, layers=4, heads=2, inner=64)


@pytest.fixture(scope="module")
def sample() -> clip_evaluate.Sample:
    return draw_sample(6)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return reader.make_model(TINY, 1).eval()


def test_a_sample_has_as_many_questions_of_each_type(sample):
    kinds = [question.type for _, question in sample.flat]
    assert {kind: kinds.count(kind) for kind in TYPES} == dict.fromkeys(TYPES, 6)
    with pytest.raises(WinnowError, match="too few questions of needle"):
        draw_sample(2, types=("needle",), spec=ClipSpec(word=0))


def test_conditions_show_what_they_say():
    drawn = clip(2, split="test")
    assert np.array_equal(seen_under(drawn, "full"), drawn.pixels)
    shuffled = seen_under(drawn, "shuffled")
    assert not np.array_equal(shuffled, drawn.pixels)
    assert sorted(frame.tobytes() for frame in shuffled) == sorted(frame.tobytes() for frame in drawn.pixels)
    assert all(np.array_equal(frame, drawn.pixels[8]) for frame in seen_under(drawn, "single-frame"))
    mean = seen_under(drawn, "averaged")
    assert mean.shape == drawn.pixels.shape
    assert np.abs(mean[3].astype(float) - drawn.pixels.mean(0)).max() <= 0.5


def test_evidence_comes_first(sample):
    for drawn, question in sample.flat:
        layout = layout_of(drawn)
        kept = clip_evaluate._evidence(drawn, question, layout, 36)
        assert len(set(kept)) == 36
        assert kept == sorted(kept)
        matters = np.flatnonzero(layout.covering(stretches(question.evidence, drawn.side, drawn.frames)))
        inside = set(matters.tolist()) & set(kept)
        assert len(inside) == min(36, len(matters))


def test_whole_seconds_are_kept(sample):
    drawn, question = sample.flat[0]
    kept = clip_evaluate._seconds(drawn, question, layout_of(drawn), 18)
    assert kept == [*range(18, 27), *range(54, 63)]


def test_a_blind_model_sees_nothing(model, sample):
    """What is blind does not depend on the clips."""
    first = under(model, sample, "blind")
    other = clip_evaluate.Sample(tuple(clip(900 + i) for i in range(len(sample.clips))), sample.questions)
    assert under(model, other, "blind") == first


def test_one_pass_gives_what_generate_gives(model, sample):
    """Also for questions that the model answers right: the truth is set to what it says."""
    processor = reader.ClipProcessor(reader.make_tokenizer())
    drawn = sample.clips[0]
    said = {q.text: reader.answer(model, processor, drawn.pixels, q.text).split(" ")[0] for q in sample.questions[0]}
    asked = tuple(ClipQuestion(q.type, q.text, said[q.text] or "no", ()) for q in sample.questions[0])
    alone = clip_evaluate.Sample((drawn,), (asked,))
    marks = under(model, alone, "full")[0]
    for question, mark in zip(asked, marks, strict=True):
        generated = reader.answer(model, processor, drawn.pixels, question.text)
        assert mark == (generated == question.answer), question


def test_unknown_names_are_refused(model, sample):
    with pytest.raises(WinnowError, match="averaged"):
        under(model, sample, "reversed")
    with pytest.raises(WinnowError, match="evidence"):
        clip_evaluate.with_tokens(model, sample, "best", 0.5)


def test_accuracies_are_read_by_type_and_level(sample):
    marks = [[question.type in ("presence", "order") for question in row] for row in sample.questions]
    found = by_type(sample, marks)
    assert found["presence"] == found["order"] == 1
    assert found["perception"] == 0.5
    assert found["relation"] == pytest.approx(1 / 3)
    assert found["overall"] == pytest.approx(2 / 11)
    assert relation_gap({"perception": 0.8, "relation": 0.8}, {"perception": 0.8, "relation": 0.4}) == 0.5
    assert majority(sample)["presence"] >= 0.5


def test_the_card_says_what_is_not_learned(tmp_path, model):
    model.save_pretrained(tmp_path)
    reader.make_tokenizer().save_pretrained(tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"stage": "all", "step": 3, "cpu_seconds": 60.0, "clips": 1000, "when": 0.1}) + "\n")
    card = video_card.make(tmp_path, log=log, per_type=4, date="2026-11-30")
    page = (tmp_path / "README.md").read_text()
    assert card["learned"] == []
    assert "Not learned: presence, change" in page
    assert card["through_generate"] == 1
    assert set(card["accuracy"]) == set(clip_evaluate.CONDITIONS)
    assert json.loads((tmp_path / "card.json").read_text()) == card
    assert "1 minutes of one CPU thread" in page
