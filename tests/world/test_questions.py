"""Questions: answers that follow from what is in the picture, checked by a second reading of the text; balance."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import islice

import pytest

from winnow import world

SCENES = 1500


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [world.scene(seed, split="test", per_type=2) for seed in range(SCENES)]


def things(drawn: world.Scene, name: str = "", color: str = "") -> list[world.Item]:
    return [
        item
        for item in drawn.objects
        if item.kind in ("glyph", "shape") and name in ("", "shape", item.name) and color in ("", item.color)
    ]


def only(items: Sequence[world.Item]) -> world.Item:
    assert len(items) == 1
    return items[0]


def label_owner(drawn: world.Scene, word: str) -> world.Item:
    """The thing whose own label shows the word."""
    label = only([i for i in drawn.objects if i.text == word and i.partner and i.partner.kind != "text"])
    return label.partner


def read_again(drawn: world.Scene, text: str) -> str:
    """Answer a question from its text and the objects, without the code that made it."""
    patterns = {
        r"is there a (?:(\w+) )?(\w+)\?": lambda c, n: "yes" if things(drawn, n, c or "") else "no",
        r"how many (?:(\w+) )?(\w+)\?": lambda c, n: str(len(things(drawn, n, c or ""))),
        r"what color is the (\w+)\?": lambda n: only(things(drawn, n)).color,
        r"what shape is (\w+)\?": lambda c: only(things(drawn, color=c)).name,
        r"where is the word (\w+)\?": lambda w: place(drawn, only([i for i in drawn.objects if i.text == w])),
        r"where is the (\w+)\?": lambda n: place(drawn, only(things(drawn, n))),
        r"is the (\w+) (left of|right of|above|below) the (\w+)\?": lambda a, how, b: relation(
            only(things(drawn, a)), how, only(things(drawn, b))
        ),
        r"what (?:word|number) is near the (\w+)\?": lambda n: only(things(drawn, n)).partner.text,
        r"what (?:word|number) is near the (\w+) shape\?": lambda c: only(things(drawn, color=c)).partner.text,
        r"what is near the word (\w+)\?": lambda w: label_owner(drawn, w).name,
        r"what color is the shape near the word (\w+)\?": lambda w: label_owner(drawn, w).color,
        r"what number is after the word (\w+)\?": lambda w: (
            only([i for i in drawn.objects if i.text == w and i.partner and i.partner.kind == "text"]).partner.text
        ),
        r"which bar is (tallest|shortest)\?": lambda how: bar(drawn, how),
        r"is the (\w+) bigger than the (\w+)\?": lambda a, b: yes(
            only(things(drawn, a)).extent > only(things(drawn, b)).extent
        ),
        r"are there more (\w+) than (\w+)\?": lambda a, b: yes(len(things(drawn, a)) > len(things(drawn, b))),
    }
    for pattern, answer in patterns.items():
        if match := re.fullmatch(pattern, text):
            return answer(*match.groups())
    raise AssertionError(f"no reading of {text!r}")


def yes(value: bool) -> str:
    return "yes" if value else "no"


def place(drawn: world.Scene, thing: world.Item) -> str:
    x, y = thing.center
    return f"{'bottom' if y > drawn.size / 2 else 'top'}-{'right' if x > drawn.size / 2 else 'left'}"


def relation(a: world.Item, how: str, b: world.Item) -> str:
    (ax, ay), (bx, by) = a.center, b.center
    return yes({"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[how])


def bar(drawn: world.Scene, how: str) -> str:
    bars = sorted((i for i in drawn.objects if i.kind == "bar"), key=lambda i: i.box.y1 - i.box.y0)
    return bars[-1 if how == "tallest" else 0].color


def test_answers_follow_from_the_picture(scenes):
    asked = Counter()
    for drawn in scenes:
        for question in drawn.questions:
            asked[question.type] += 1
            assert read_again(drawn, question.text) == question.answer, (drawn.seed, question)
    assert set(asked) == set(world.TYPES)
    assert min(asked.values()) > 200


def test_evidence_shows_what_is_asked(scenes):
    """Reading needs the thing and its label, a relation both things, a chart all its bars."""
    for drawn in scenes[:400]:
        for question in drawn.questions:
            if question.type in ("relation", "reading", "referring", "document", "two-hop"):
                assert len(set(question.evidence)) == 2
            if question.type == "chart":
                assert len(question.evidence) == sum(i.kind == "bar" for i in drawn.objects)


# The best constant answer may score this much; a uniform answer would score the reciprocal of the number of answers.
MAJORITY = {
    "presence": 0.54,
    "count": 0.26,
    "count-if": 0.34,
    "color": 0.14,
    "shape": 0.16,
    "relation": 0.54,
    "place": 0.29,
    "reading": 0.04,
    "referring": 0.09,
    "document": 0.04,
    "chart": 0.15,
    "comparison": 0.54,
    "two-hop": 0.09,
}


def test_answers_are_balanced(scenes):
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for drawn in scenes:
        for question in drawn.questions:
            answers[question.type][question.answer] += 1
    for kind, counts in answers.items():
        share = counts.most_common(1)[0][1] / sum(counts.values())
        assert share <= MAJORITY[kind], (kind, share, counts.most_common(5))


def test_yes_and_no_do_not_depend_on_the_words(scenes):
    """Someone who knows how often each kind of thing is present must not gain by it."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for drawn in scenes:
        for question in drawn.questions:
            if question.answer in ("yes", "no"):
                shaped = any(word.rstrip("?") in world.SHAPES for word in question.text.split())
                kinds[f"{question.type} {'shape' if shaped else 'glyph'}"][question.answer] += 1
    for kind, counts in kinds.items():
        assert 0.42 <= counts["yes"] / sum(counts.values()) <= 0.58, (kind, counts)


def words(question: world.Question) -> set[str]:
    return {*re.findall(r"[\w-]+", question.text), question.answer}


def test_held_out_glyphs_are_asked_about_in_their_split_only(scenes):
    assert any(item.name in world.HELD_OUT for drawn in scenes for item in drawn.objects)
    assert not any(words(q) & world.HELD_OUT for drawn in scenes for q in drawn.questions)
    held = [world.scene(seed, split="heldout_glyphs") for seed in range(400)]
    questions = [q for drawn in held for q in drawn.questions]
    assert len(questions) > 200
    assert all(words(q) & world.HELD_OUT for q in questions)
    presence = [q.answer for q in questions if q.type == "presence"]
    assert 0.38 <= presence.count("yes") / len(presence) <= 0.62


def test_clutter_is_drawn_and_never_asked_about(scenes):
    clutter = {item.name for drawn in scenes for item in drawn.objects if item.kind == "clutter"}
    assert len(clutter) >= 20
    assert not any(words(q) & clutter for drawn in scenes for q in drawn.questions)


def test_absent_things_are_often_related_to_present_ones():
    """The traps of presence: many absent glyphs are neighbours, in the sheet, of one that is there."""
    near = total = 0
    for drawn in islice((world.scene(seed, types=("presence",)) for seed in range(1200)), 1200):
        present = [world.GLYPHS.index(i.name) for i in drawn.objects if i.kind == "glyph"]
        for question in drawn.questions:
            name = question.text.removeprefix("is there a ").rstrip("?")
            if question.answer == "no" and name in world.GLYPHS:
                total += 1
                near += any(abs(world.GLYPHS.index(name) - at) <= 6 for at in present)
    assert total > 150
    assert near / total > 0.5
