"""The words of the recall texts, and the small language of their filler.

Everything is plain data: a word's id is its place in `VOCABULARY`. Names and values mean nothing, so that what stands
in a text can only be known from that text.
"""

from __future__ import annotations

import itertools
import random
from functools import cache

PAD, BOS = "<pad>", "<s>"
MARKS = ("?", "=", ";", "the", "code", "of", "is", "repeat")
_STARTS = ("ba", "ce", "di", "fo", "gu", "ha", "ji", "ko", "lu", "me", "na", "po")
_ENDS = ("bar", "den", "fil", "gon", "hus", "kar", "lem", "min", "nor", "pas", "tek")
NAMES = tuple(start + end for start, end in itertools.product(_STARTS, _ENDS))[:128]
VALUES = tuple(f"{number:02d}" for number in range(100))
_FILLER = """
air all and ash bay bee big bird blue boat book bread by calm clay cloud coast cold corn dark day deep dew dry dust
early east fall farm field fire fish fog from grass grey hill in lake late leaf light long low moon near north oak old
on path rain river road salt sand sea slow snow south still stone
"""
FILLER = tuple(_FILLER.split())
VOCABULARY = (PAD, BOS, *MARKS, *NAMES, *VALUES, *FILLER)
WORD_ID = {word: index for index, word in enumerate(VOCABULARY)}

FOLLOWERS = 8  # words that may follow a filler word
FAVOURITE = 0.5  # how often a text takes its own favourite among them
_LANGUAGE = 20261130  # seed of the table of followers, the same in all texts


def ids(*words: str) -> tuple[int, ...]:
    """Ids of words of the vocabulary."""
    return tuple(WORD_ID[word] for word in words)


def words(given: tuple[int, ...] | list[int]) -> str:
    """The text of ids, words apart by spaces."""
    return " ".join(VOCABULARY[index] for index in given)


NAME_IDS, VALUE_IDS, FILLER_IDS = ids(*NAMES), ids(*VALUES), ids(*FILLER)


@cache
def followers() -> dict[int, tuple[int, ...]]:
    """The words that may follow each filler word."""
    rng = random.Random(_LANGUAGE)
    return {word: tuple(rng.sample(FILLER_IDS, FOLLOWERS)) for word in FILLER_IDS}


def filler(rng: random.Random, count: int) -> list[int]:
    """`count` ids of filler: a Markov chain in which each text has favourites of its own.

    After a word comes, with probability FAVOURITE, the word that this text favours there, otherwise any of the
    followers. So reading the text so far makes its rest easier to predict, and what a cache loses shows in perplexity.
    """
    table = followers()
    favourite = {word: rng.choice(table[word]) for word in FILLER_IDS}
    word = rng.choice(FILLER_IDS)
    made = []
    for _ in range(count):
        made.append(word)
        word = favourite[word] if rng.random() < FAVOURITE else rng.choice(table[word])
    return made
