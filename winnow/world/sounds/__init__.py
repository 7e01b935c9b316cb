"""Sounds made from a seed, with questions whose evidence is known to the sample of the wave."""

from winnow.world.sounds.mel import log_mel, mel_tokens
from winnow.world.sounds.scenes import KINDS, Event, Question, Sound, sound
from winnow.world.sounds.waves import DIGITS, EVENTS, NOTES, RATE

__all__ = [
    "DIGITS",
    "EVENTS",
    "KINDS",
    "NOTES",
    "RATE",
    "Event",
    "Question",
    "Sound",
    "log_mel",
    "mel_tokens",
    "sound",
]
