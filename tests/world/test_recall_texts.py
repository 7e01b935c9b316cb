"""Recall texts: drawn from a seed, and their evidence is where the answer stands."""

from __future__ import annotations

import itertools

import pytest

from winnow.core.errors import WinnowError
from winnow.world import recall
from winnow.world.recall import COPIED, CUE, TASKS, draw
from winnow.world.recall_words import FILLER_IDS, FOLLOWERS, VOCABULARY, WORD_ID, followers, words

ASKING = TASKS[:-1]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [128, 512, 1024])
def test_a_seed_decides_the_sample(task, length):
    assert draw(task, 3, length) == draw(task, 3, length)
    drawn = {draw(task, seed, length, split).context for seed in range(8) for split in recall.SPLITS}
    assert len(drawn) == 16
    assert all(len(context) == length and words(context).startswith("<s> ") for context in drawn)


@pytest.mark.parametrize("task", ASKING)
def test_the_evidence_holds_the_question_and_the_answer(task):
    for seed in range(30):
        sample = draw(task, seed, 256)
        assert len(sample.asked) == recall.COUNTS[task][1]
        for asked in sample.asked:
            ((start, end),) = asked.evidence
            held = sample.context[start:end]
            assert held[-len(asked.answer) :] == asked.answer
            key = len(held) - len(asked.answer)
            # What the question names stands there, and nowhere else in the context.
            if task == "copy":
                assert asked.question[-CUE:] == held[:CUE]
                assert len(asked.answer) == COPIED
            else:
                assert held[0] in asked.question
                assert sample.context.count(held[0]) == 1
                assert asked.question[-key:] == held[:key]


def test_an_answer_cannot_be_read_without_its_evidence():
    """With the evidence covered, the context no longer holds the name that is asked for."""
    for seed in range(30):
        sample = draw("pairs", seed, 256, facts=12, asks=12)
        assert len({asked.evidence for asked in sample.asked}) == 12
        for asked in sample.asked:
            ((start, end),) = asked.evidence
            assert asked.question[1] not in sample.context[:start] + sample.context[end:]


def test_the_facts_lie_anywhere():
    starts = [draw("needle", seed, 256).asked[0].evidence[0][0] for seed in range(200)]
    assert min(starts) < 30
    assert max(starts) > 225
    assert 100 < sum(starts) / len(starts) < 156


def test_filler_follows_its_language_and_each_text_has_favourites():
    pairs = []
    for seed in range(20):
        context = draw("filler", seed, 1024).context[1:]
        assert all(b in followers()[a] for a, b in itertools.pairwise(context))
        counted: dict[int, dict[int, int]] = {}
        for a, b in itertools.pairwise(context):
            counted.setdefault(a, {}).setdefault(b, 0)
            counted[a][b] += 1
        pairs += [max(row.values()) / sum(row.values()) for row in counted.values() if sum(row.values()) >= 10]
    assert sum(pairs) / len(pairs) > 2 / FOLLOWERS


def test_the_vocabulary_is_plain():
    assert len(set(VOCABULARY)) == len(VOCABULARY) == len(WORD_ID)
    assert all(word == word.strip() and " " not in word for word in VOCABULARY)
    assert max(FILLER_IDS) == len(VOCABULARY) - 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": "novel"}, "the tasks are needle"),
        ({"task": "needle", "split": "dev"}, "train, test"),
        ({"task": "pairs", "length": 64}, "too short"),
        ({"task": "pairs", "facts": 4, "asks": 5}, "5 questions about 4 facts"),
        ({"task": "filler", "facts": 1}, "filler"),
        ({"task": "needle", "facts": 500, "length": 9999}, "at most 128 facts"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, said):
    with pytest.raises(WinnowError, match=said):
        draw(**{"seed": 0, **arguments})
