"""Sounds from a seed: what is heard is where it is said to be, and the answers are those of the wave."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.world.sounds import DIGITS, KINDS, NOTES, RATE, log_mel, mel_tokens, sound
from winnow.world.sounds.mel import HOP
from winnow.world.sounds.waves import event


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bytes_and_another_gives_others(kind):
    one, same, other = sound(3, kind), sound(3, kind), sound(4, kind)
    assert one.wave.tobytes() == same.wave.tobytes()
    assert (one.events, one.questions) == (same.events, same.questions)
    assert one.wave.tobytes() != other.wave.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_events_are_loud_where_they_are_said_to_be_and_silence_is_quiet(kind):
    for seed in range(10):
        made = sound(seed, kind)
        assert np.abs(made.wave).max() <= 1.0
        heard = np.zeros(len(made.wave), dtype=bool)
        for one in made.events:
            start, stop = (round(t * RATE) for t in one.span)
            assert 0 < start < stop <= len(made.wave)
            assert not heard[start:stop].any(), "events do not overlap"
            heard[start:stop] = True
            assert np.abs(made.wave[start:stop]).max() > 0.1
        assert np.abs(made.wave[~heard]).max() < 0.01
        for question in made.questions:
            assert question.evidence == tuple(sorted(question.evidence))
            assert set(question.evidence) <= {one.span for one in made.events}


@pytest.mark.parametrize("kind", KINDS)
def test_events_lie_on_the_grid_of_tokens(kind):
    for one in sound(0, kind).events:
        assert [t / 0.04 for t in one.span] == pytest.approx([round(t / 0.04) for t in one.span])


def loudest(wave, span):
    """Hertz of the largest overtone between two times."""
    start, stop = (round(t * RATE) for t in span)
    part = wave[start:stop] * np.hanning(stop - start)
    return float(np.fft.rfftfreq(len(part), 1 / RATE)[np.abs(np.fft.rfft(part)).argmax()])


def test_tones_have_their_pitch_and_the_answer_compares_them():
    answers = Counter()
    for seed in range(100):
        made = sound(seed, "tones")
        pitches = [loudest(made.wave, one.span) for one in made.events]
        assert pitches == pytest.approx([NOTES[one.name] for one in made.events], rel=0.02)
        assert all(a.name != b.name for a, b in zip(made.events, made.events[1:], strict=False))
        (question,) = made.questions
        assert question.answer == ("yes" if pitches[1] > pitches[0] else "no")
        answers[question.answer] += 1
    assert min(answers["yes"], answers["no"]) >= 35


def test_clicks_can_be_counted():
    for seed in range(20):
        made = sound(seed, "rhythm")
        (question,) = made.questions
        start, stop = (round(t * RATE) for t in question.evidence[0])
        level = np.abs(made.wave[start:stop]).reshape(-1, round(0.01 * RATE)).max(1) > 0.3
        onsets = int(level[0]) + int((level[1:] & ~level[:-1]).sum())
        assert str(onsets) == question.answer


def test_the_digit_after_the_bell_is_the_answer_and_the_bell_is_evidence_too():
    places = Counter()
    for seed in range(40):
        made = sound(seed, "words")
        (question,) = made.questions
        names = [one.name for one in made.events]
        at = names.index("bell")
        assert question.answer == names[at + 1]
        assert question.answer in DIGITS
        assert question.evidence == (made.events[at].span, made.events[at + 1].span)
        places[at] += 1
    assert len(places) == 6, "the bell is not always at one place"


def test_words_differ_in_what_is_heard():
    """The mean spectrum of a digit is nearest to that of the same digit in another sound."""
    rows: dict[str, list[np.ndarray]] = {}
    for seed in range(40):
        made = sound(seed, "words")
        x = mel_tokens(made.wave)
        x = x - x.mean(0)
        for one in made.events:
            if one.kind == "word":
                start, stop = (round(t / 0.04) for t in one.span)
                half = (start + stop) // 2
                own = np.concatenate([x[start + 1 : half].mean(0), x[half : stop - 1].mean(0)])
                rows.setdefault(one.name, []).append(own / np.linalg.norm(own))
    first = {name: own[0] for name, own in rows.items()}
    asked = [(name, other) for name, own in rows.items() for other in own[1:]]
    hits = sum(max(first, key=lambda key: first[key] @ other) == name for name, other in asked)
    assert hits > 0.9 * len(asked), f"{hits} of {len(asked)}"


def test_before_and_after_are_asked_in_both_senses():
    answers = Counter(sound(seed, "events").questions[0].answer for seed in range(40))
    assert min(answers["yes"], answers["no"]) >= 12
    for seed in range(10):
        made = sound(seed, "events")
        (question,) = made.questions
        first = {one.name: one.span[0] for one in made.events}
        assert question.answer == ("yes" if first[question.words[0]] < first[question.words[1]] else "no")


def test_mels_are_those_of_whisper():
    """Up to its scale, which is a clip at 8 decades under the loudest, and (x + 4) / 4."""
    wave = sound(1, "words").wave
    own = log_mel(wave)
    theirs = WhisperFeatureExtractor(feature_size=80)(wave, sampling_rate=RATE, return_tensors="np").input_features[0].T
    assert len(own) == len(wave) // HOP
    scaled = (np.maximum(own, own.max() - 8) + 4) / 4
    assert np.abs(scaled - theirs[: len(own)])[:-3].max() < 2e-3


def test_tokens_are_means_of_four_frames_and_evidence_covers_them():
    made = sound(2, "words")
    x = mel_tokens(made.wave)
    assert np.allclose(x[5], log_mel(made.wave)[20:24].mean(0))
    layout = Layout.sound(len(x), 0.04)
    (question,) = made.questions
    found = np.flatnonzero(layout.covering(question.boxes(layout.seconds)))
    want = [t for start, stop in question.evidence for t in range(round(start / 0.04), round(stop / 0.04))]
    assert found.tolist() == [t for t in want if t < len(x)]


def test_what_is_not_known_is_refused():
    with pytest.raises(WinnowError, match="allowed: tones, rhythm, words, events"):
        sound(0, "music")
    with pytest.raises(WinnowError, match="allowed: bell"):
        event("dog", 1.0, np.random.default_rng(0))
    with pytest.raises(WinnowError, match="one channel"):
        log_mel(np.zeros((2, 1000)))
