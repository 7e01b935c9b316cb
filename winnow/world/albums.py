"""Albums: several pictures of winnow's world, and a question that one of them alone can answer.

Nothing in the question says which picture is meant: what it names is in one of them, and in no other.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from winnow.core.errors import WinnowError
from winnow.world.items import Question, Scene
from winnow.world.names import COLORS, GLYPHS, SHAPES, SPLITS, WORDS
from winnow.world.scenes import SEEDS_PER_SPLIT, scene

VERSION = 1
# Questions that name one thing, and whose answer can hardly be guessed.
TYPES = ("color", "shape", "reading", "referring", "document", "two-hop")
MOST = 64  # pictures: with more, hardly a name is in one picture alone
_NAMES = frozenset((*GLYPHS, *SHAPES, *COLORS, *WORDS))


@dataclass(frozen=True, slots=True)
class Album:
    """Pictures in the order in which they are shown; the question is about `scenes[place]`."""

    scenes: tuple[Scene, ...]
    place: int
    question: Question


@lru_cache(maxsize=256)  # drawing one costs more than reading it
def album(seed: int, pictures: int, split: str = "test", *, size: int = 224) -> Album:
    """The album of a seed: `pictures` scenes, the one that is asked about anywhere among them."""
    if not 1 <= pictures <= MOST:
        raise WinnowError(f"an album of {pictures} pictures was asked for; it has 1 to {MOST}")
    if split not in SPLITS:
        raise WinnowError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"{VERSION} {split} {pictures} {size} {seed}")
    others = [_drawn(rng, size, split, ()) for _ in range(pictures - 1)]
    place = rng.randrange(pictures)
    while True:
        own = _drawn(rng, size, split, TYPES)
        fits = [question for question in own.questions if not _names(question) & _shown(others)]
        if fits:
            return Album((*others[:place], own, *others[place:]), place, rng.choice(fits))


def _drawn(rng: random.Random, size: int, split: str, types: Sequence[str]) -> Scene:
    return scene(rng.randrange(SEEDS_PER_SPLIT), size, split, types=types)


def _names(question: Question) -> frozenset[str]:
    """What the question names."""
    return _NAMES & frozenset(question.text.rstrip("?").split())


def _shown(scenes: Sequence[Scene]) -> frozenset[str]:
    """What things in these pictures are called, their colours and what is written there."""
    return frozenset(word for drawn in scenes for item in drawn.objects for word in (item.name, item.color, item.text))
