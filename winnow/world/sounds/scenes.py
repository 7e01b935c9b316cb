"""Sounds of a few events with silence between them, and questions about what was when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from winnow.core.errors import WinnowError
from winnow.world.sounds.waves import DIGITS, EVENTS, NOTES, RATE, Wave, clicks, event, tone, word

Span = tuple[float, float]  # seconds, from and to
GRAIN = 0.04  # events begin at multiples of it, so that a token of 40 ms holds an event or none
HUM = 1e-3  # of the noise that is in every silence


@dataclass(frozen=True)
class Event:
    """Something that is heard.

    Attributes:
        kind: tone, clicks, word or event.
        name: of the note, the digit or the noise; of clicks, their number.
        span: from when to when, in seconds.
    """

    kind: str
    name: str
    span: Span


@dataclass(frozen=True)
class Question:
    """A question about a sound, its answer, and when what it depends on is heard.

    Attributes:
        words: what the question names, which a method that compares sound and text could look for.
        evidence: spans of seconds, in order.
    """

    type: str
    text: str
    answer: str
    words: tuple[str, ...]
    evidence: tuple[Span, ...]

    def boxes(self, seconds: float) -> tuple[tuple[float, float, float, float], ...]:
        """The evidence as `Layout.covering` of a sound takes it; `seconds`: what its tokens cover."""
        return tuple((a / seconds, 0.0, min(1.0, b / seconds), 1.0) for a, b in self.evidence if a < seconds)


@dataclass(frozen=True, eq=False)
class Sound:
    """A sound: its wave `[samples]` at `RATE`, what is heard in it, and what is asked."""

    wave: Wave
    events: tuple[Event, ...]
    questions: tuple[Question, ...]

    @property
    def seconds(self) -> float:
        return len(self.wave) / RATE


def sound(seed: int, kind: str) -> Sound:
    """A sound of a kind. The same seed and kind give the same bytes.

    Args:
        kind: `tones` (three to six, no two alike in a row, with silence between some), `rhythm` (two runs of clicks),
            `words` (a bell among six digits) or `events` (three noises in some order).
    """
    if kind not in KINDS:
        raise WinnowError(f"a sound of kind {kind!r} is not known; allowed: {', '.join(KINDS)}.")
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    parts, ask = KINDS[kind](rng)
    events, pieces, at = [], [_silence(_grains(rng, 5, 12), rng)], 0
    at = len(pieces[0])
    for found, wave, gap in parts:
        events.append(Event(*found, (at / RATE, (at + len(wave)) / RATE)))
        pieces += [wave + HUM * rng.standard_normal(len(wave)), _silence(gap, rng)]
        at += len(wave) + len(pieces[-1])
    return Sound(np.concatenate(pieces), tuple(events), ask(events))


Part = tuple[tuple[str, str], Wave, float]  # kind and name, wave, seconds of silence behind it
Asked = Callable[[list[Event]], tuple[Question, ...]]


def _tones(rng: np.random.Generator) -> tuple[list[Part], Asked]:
    lower, higher = sorted(map(str, rng.choice(list(NOTES), 2, replace=False)), key=NOTES.__getitem__)
    names = [lower, higher] if rng.random() < 0.5 else [higher, lower]  # the answer is drawn before the tones
    for _ in range(rng.integers(1, 5)):
        names.append(str(rng.choice([name for name in NOTES if name != names[-1]])))
    parts: list[Part] = []
    for name in names:
        gap = _grains(rng, 4, 10) if rng.random() < 0.5 else 0.0
        parts.append((("tone", name), tone(name, _grains(rng, 6, 15)), gap))

    def ask(events: list[Event]) -> tuple[Question, ...]:
        first, second = events[0], events[1]
        higher = "yes" if NOTES[second.name] > NOTES[first.name] else "no"
        text = "is the second tone higher than the first?"
        return (Question("higher", text, higher, ("tone",), (first.span, second.span)),)

    return parts, ask


def _rhythm(rng: np.random.Generator) -> tuple[list[Part], Asked]:
    parts: list[Part] = []
    for _ in range(2):
        count = int(rng.integers(2, 7))
        parts.append((("clicks", str(count)), clicks(count, _grains(rng, 3, 7)), _grains(rng, 15, 25)))

    def ask(events: list[Event]) -> tuple[Question, ...]:
        return (
            Question("count", "how many clicks are in the first run?", events[0].name, ("clicks",), (events[0].span,)),
        )

    return parts, ask


def _words(rng: np.random.Generator) -> tuple[list[Part], Asked]:
    digits = rng.choice(list(DIGITS), 6, replace=False)
    parts: list[Part] = [(("word", str(d)), word(str(d), _grains(rng, 8, 13)), _grains(rng, 3, 9)) for d in digits]
    parts.insert(
        int(rng.integers(0, 6)), (("event", "bell"), event("bell", _grains(rng, 6, 10), rng), _grains(rng, 3, 6))
    )

    def ask(events: list[Event]) -> tuple[Question, ...]:
        bell, after = next((a, b) for a, b in pairwise(events) if a.name == "bell")
        text = "which digit comes after the bell?"
        return (Question("after", text, after.name, ("bell", "digit"), (bell.span, after.span)),)

    return parts, ask


def _events(rng: np.random.Generator) -> tuple[list[Part], Asked]:
    names = [str(name) for name in rng.choice(list(EVENTS), 3, replace=False)]
    parts: list[Part] = [(("event", n), event(n, _grains(rng, 10, 25), rng), _grains(rng, 8, 30)) for n in names]

    def ask(events: list[Event]) -> tuple[Question, ...]:
        one, other = (events[i] for i in sorted(rng.choice(3, 2, replace=False)))
        turned = rng.random() < 0.5
        named = (other, one) if turned else (one, other)
        text = f"does the {named[0].name} come before the {named[1].name}?"
        answer = "no" if turned else "yes"
        return (Question("order", text, answer, (named[0].name, named[1].name), (one.span, other.span)),)

    return parts, ask


KINDS: dict[str, Callable[[np.random.Generator], tuple[list[Part], Asked]]] = {
    "tones": _tones,
    "rhythm": _rhythm,
    "words": _words,
    "events": _events,
}


def _grains(rng: np.random.Generator, least: int, most: int) -> float:
    """Seconds, as a number of tokens from `least` to `most`."""
    return GRAIN * int(rng.integers(least, most + 1))


def _silence(seconds: float, rng: np.random.Generator) -> Wave:
    return HUM * rng.standard_normal(round(seconds * RATE))
