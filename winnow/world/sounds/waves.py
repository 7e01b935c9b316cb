"""Waves of single events, `[samples]` in −1 … 1: tones, clicks, formant-like words, and noises with names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from winnow.core.errors import WinnowError

Wave = Float[np.ndarray, " n"]

RATE = 16_000  # samples of a second, which Whisper's encoders take

# Hertz, far enough apart that no two share a band of the mel scale.
NOTES = {"low": 220.0, "middle": 440.0, "high": 880.0, "shrill": 1760.0}

# Two vowels each, as the first two formants of each vowel in hertz.
_VOWELS = {"a": (800, 1200), "e": (500, 1900), "i": (300, 2400), "o": (500, 900), "u": (320, 700)}
DIGITS = dict(
    zip(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ("io", "ua", "uu", "ii", "oo", "ai", "ie", "ea", "ei", "ae"),
        strict=True,
    )
)

FADE = 0.005  # seconds in which an event comes and goes, so that its edges do not click


def tone(note: str, seconds: float) -> Wave:
    """A tone with two overtones."""
    overtones = [np.sin(2 * np.pi * NOTES[note] * k * _clock(seconds)) / k for k in (1, 2, 3)]
    return _faded(np.sum(overtones, 0) * 0.4)


def clicks(count: int, gap: float) -> Wave:
    """`count` short clicks, one each `gap` seconds."""
    made = np.zeros(_length(count * gap))
    one = np.exp(-_clock(0.03) * 200) * np.sin(2 * np.pi * 1000 * _clock(0.03))
    for number in range(count):
        start = _length(number * gap)
        made[start : start + len(one)] += one
    return made


def word(name: str, seconds: float) -> Wave:
    """A spoken digit, as far as two vowels of a buzzing voice tell it: overtones of 120 Hz that two formants shape."""
    halves = [_vowel(letter, seconds / 2) for letter in DIGITS[name]]
    return _faded(np.concatenate(halves)[: _length(seconds)])


def _vowel(letter: str, seconds: float) -> Wave:
    t, made = _clock(seconds), np.zeros(_length(seconds))
    for k in range(1, 31):
        hertz = 120.0 * k
        gain = sum(np.exp(-(((hertz - formant) / 120) ** 2)) for formant in _VOWELS[letter])
        made += gain * np.sin(2 * np.pi * hertz * t)
    return made / max(1e-9, np.abs(made).max()) * 0.7


def event(name: str, seconds: float, rng: np.random.Generator) -> Wave:
    """A noise with a name."""
    if name not in EVENTS:
        raise WinnowError(f"event {name!r} is not known; allowed: {', '.join(EVENTS)}.")
    return _faded(EVENTS[name](seconds, rng))


def _bell(seconds: float, rng: np.random.Generator) -> Wave:
    t = _clock(seconds)
    return np.exp(-3 * t / seconds) * (np.sin(2 * np.pi * 2637 * t) + np.sin(2 * np.pi * 3951 * t)) * 0.4


def _siren(seconds: float, rng: np.random.Generator) -> Wave:
    t = _clock(seconds)
    return 0.6 * np.sin(2 * np.pi * (600 * t + 500 * t**2 / (2 * seconds)))


def _hiss(seconds: float, rng: np.random.Generator) -> Wave:
    return np.diff(rng.standard_normal(_length(seconds) + 1)) * 0.15


def _rumble(seconds: float, rng: np.random.Generator) -> Wave:
    t = _clock(seconds)
    return np.sum([np.sin(2 * np.pi * hertz * t + rng.uniform(0, 6)) for hertz in (60, 75, 95)], 0) * 0.25


EVENTS: dict[str, Callable[[float, np.random.Generator], Wave]] = {
    "bell": _bell,
    "siren": _siren,
    "hiss": _hiss,
    "rumble": _rumble,
}


def _length(seconds: float) -> int:
    return round(seconds * RATE)


def _clock(seconds: float) -> Wave:
    return np.arange(_length(seconds)) / RATE


def _faded(wave: Wave) -> Wave:
    fade = min(_length(FADE), len(wave) // 2)
    ramp = np.ones(len(wave))
    ramp[:fade] = np.linspace(0, 1, fade)
    ramp[len(wave) - fade :] = np.linspace(1, 0, fade)
    return wave * ramp
