"""Albums: one picture alone answers the question, and the question names what is in it."""

from __future__ import annotations

from collections import Counter

import pytest

from winnow.core.errors import WinnowError
from winnow.world.albums import TYPES, album


@pytest.mark.parametrize("pictures", [1, 3, 8])
def test_what_the_question_names_is_in_one_picture_alone(pictures: int) -> None:
    for seed in range(12):
        drawn = album(seed, pictures)
        assert len(drawn.scenes) == pictures
        own, question = drawn.scenes[drawn.place], drawn.question
        assert question in own.questions
        assert question.evidence
        assert question.type in TYPES
        subject = question.text.rstrip("?").split()[-1]  # the thing, the word or the colour that is asked about
        if subject == "shape":
            subject = question.text.rstrip("?").split()[-2]
        shows = [any(subject in (item.name, item.color, item.text) for item in s.objects) for s in drawn.scenes]
        assert shows == [at == drawn.place for at in range(pictures)], question.text


def test_a_seed_decides_the_album() -> None:
    def said(seed: int, split: str = "test") -> tuple[object, ...]:
        drawn = album(seed, 2, split)
        return drawn.place, drawn.question, tuple(s.pixels.tobytes() for s in drawn.scenes)

    assert said(3) == said(3)
    assert len({said(seed, split) for seed in range(4) for split in ("test", "train")}) == 8


def test_each_place_and_type_is_asked_about() -> None:
    drawn = [album(seed, 3) for seed in range(90)]
    places, types = Counter(one.place for one in drawn), Counter(one.question.type for one in drawn)
    assert min(places[place] for place in range(3)) > 15
    assert set(types) == set(TYPES)
    assert max(types.values()) < 45
    assert len({one.question.answer for one in drawn}) > 30


@pytest.mark.parametrize(
    ("pictures", "split", "said"), [(0, "test", "1 to 64"), (65, "test", "1 to 64"), (2, "x", "test")]
)
def test_what_cannot_be_drawn_is_refused(pictures: int, split: str, said: str) -> None:
    with pytest.raises(WinnowError, match=said):
        album(0, pictures, split)
