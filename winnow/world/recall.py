"""Texts that ask for what stood far back in them: for measuring what a model's cache still holds.

A sample is a context and questions about it, all as ids of `recall_words.VOCABULARY`, drawn from a seed. The tasks:

    needle    one fact in filler: "the code of <name> is <v1> <v2> ;". "? the code of <name> is" → "<v1> <v2>"
    pairs     many pairs "<name> = <v> ;" in filler. "? <name> =" → "<v>"
    several   many facts in filler, and questions about some of them, one after the other
    copy      spans of random words in filler, "repeat <s1> … <s12> ;". "? repeat <s1> <s2>" → "<s3> … <s8>"
    filler    filler alone, no question: for perplexity

Each question comes with its evidence: the stretches of the context on which its answer depends.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from winnow.core.errors import WinnowError
from winnow.world.recall_words import BOS, NAME_IDS, VALUE_IDS, filler, ids

VERSION = 1
TASKS = ("needle", "pairs", "several", "copy", "filler")
SPLITS = ("train", "test")
SPAN, CUE, COPIED = 12, 2, 6  # words of a span, of it in the question, and to be answered
# How much of what is asked about stands in a context, and how many questions there are, unless told otherwise.
COUNTS = {"needle": (1, 1), "pairs": (24, 1), "several": (8, 4), "copy": (3, 1), "filler": (0, 0)}

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and its evidence: [start, end) positions of the context."""

    question: Ids
    answer: Ids
    evidence: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Recall:
    """A context of exactly the length asked for, `<s>` included, and questions about it."""

    task: str
    context: Ids
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class _Fact:
    """What is written into the filler; `needed` are the places in `text` of its evidence."""

    text: Ids
    question: Ids
    answer: Ids
    needed: tuple[int, int]


def draw(
    task: str, seed: int, length: int = 512, split: str = "train", *, facts: int | None = None, asks: int | None = None
) -> Recall:
    """The sample of a seed.

    Args:
        length: tokens of the context.
        facts: facts, pairs or spans in the context.
        asks: questions about them, all about different ones.
    """
    if task not in TASKS:
        raise WinnowError(f"unknown recall task {task!r}; the tasks are {', '.join(TASKS)}")
    if split not in SPLITS:
        raise WinnowError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    facts = COUNTS[task][0] if facts is None else facts
    asks = min(COUNTS[task][1], facts) if asks is None else asks
    if not 0 <= asks <= facts <= len(NAME_IDS) or (facts and task == "filler"):
        raise WinnowError(f"{asks} questions about {facts} facts of {task!r}; ask about at most {len(NAME_IDS)} facts")
    rng = random.Random(f"{VERSION} {split} {task} {length} {seed}")
    made = _facts(task, facts, rng)
    room = length - 1 - sum(len(fact.text) for fact in made)
    if room < 0:
        raise WinnowError(f"{facts} facts of {task!r} need {length - room} tokens; length={length} is too short")
    context, starts = _written(made, filler(rng, room), rng)
    chosen = rng.sample(range(facts), asks)
    asked = tuple(
        Asked(fact.question, fact.answer, ((start + fact.needed[0], start + fact.needed[1]),))
        for fact, start in ((made[number], starts[number]) for number in chosen)
    )
    return Recall(task, tuple(context), asked)


def _facts(task: str, count: int, rng: random.Random) -> list[_Fact]:
    if task == "copy":
        spans = [tuple(rng.sample(NAME_IDS + VALUE_IDS, SPAN)) for _ in range(count)]
        return [_copied(span) for span in spans]
    names = rng.sample(NAME_IDS, count)
    if task == "pairs":
        return [_pair(name, rng.choice(VALUE_IDS)) for name in names]
    return [_code(name, (rng.choice(VALUE_IDS), rng.choice(VALUE_IDS))) for name in names]


def _code(name: int, values: Ids) -> _Fact:
    said = (*ids("the", "code", "of"), name, *ids("is"))
    return _Fact((*said, *values, *ids(";")), (*ids("?"), *said), values, (3, 7))


def _pair(name: int, value: int) -> _Fact:
    said = (name, *ids("="))
    return _Fact((*said, value, *ids(";")), (*ids("?"), *said), (value,), (0, 3))


def _copied(span: Ids) -> _Fact:
    (repeat,) = ids("repeat")
    question = (*ids("?"), repeat, *span[:CUE])
    return _Fact((repeat, *span, *ids(";")), question, span[CUE : CUE + COPIED], (1, 1 + CUE + COPIED))


def _written(made: list[_Fact], around: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """The facts in their order at random places of the filler, behind `<s>`; and where each one starts."""
    gaps = sorted(rng.randrange(len(around) + 1) for _ in made)
    context, starts, at = list(ids(BOS)), [], 0
    for fact, gap in zip(made, gaps, strict=True):
        context += around[at:gap]
        starts.append(len(context))
        context += fact.text
        at = gap
    return context + around[at:], starts
