"""Two questions in turns: pairs of one scene with evidence of their own, asked on one cache in both ways."""

from __future__ import annotations

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from winnow import reference
from winnow.bench.tasks import world_turns
from winnow.bench.turns import ask_in_turns
from winnow.core.errors import WinnowError

PLAN = "fastv:layer=2,keep=16"


@pytest.fixture(scope="module")
def loaded():
    path = reference.path()
    return AutoModelForImageTextToText.from_pretrained(path, dtype="auto").eval(), AutoProcessor.from_pretrained(path)


def test_pairs_are_about_one_scene_and_other_things():
    pairs = world_turns(12, seed=5)
    assert len(pairs) == 12
    assert all(a.image == b.image and a.id != b.id and a.evidence != b.evidence for a, b in pairs)
    assert world_turns(12, seed=5) == pairs
    with pytest.raises(WinnowError, match="at least 1"):
        world_turns(0)


def test_both_ways_are_measured_beside_the_full_model(loaded):
    full, first, again = ask_in_turns(*loaded, [PLAN], world_turns(4))
    assert (full.turns, first.turns, again.turns) == ("", "first", "again")
    assert full.recall == 1.0
    assert full.change is None
    assert first.first == again.first  # the first turn is the same in both
    assert first.recall != again.recall
    assert first.read == full.read  # the new turn alone
    assert again.read > 256  # the picture's tokens too


def test_a_template_without_a_second_turn_is_refused(loaded):
    model, _ = loaded
    plain = AutoProcessor.from_pretrained(reference.path())
    plain.chat_template = "USER: <image>\n{{ messages[0]['content'][1]['text'] }} ASSISTANT:"
    with pytest.raises(WinnowError, match="second question"):
        ask_in_turns(model, plain, [PLAN], world_turns(1))
