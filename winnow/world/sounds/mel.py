"""Mel features of a wave: frames of 10 ms as Whisper's encoders take them, and means of four as tokens of 40 ms."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float

from winnow.core.errors import WinnowError
from winnow.world.sounds.waves import RATE, Wave

HOP, WINDOW, BANDS = 160, 400, 80  # samples, samples, bands of the mel scale
FLOOR = 1e-8  # of the energy in a band, below which silence is silence


def log_mel(wave: Wave, bands: int = BANDS) -> Float[np.ndarray, "frames bands"]:
    """Log10 of the energy in each band, a frame for every 10 ms; frame t is centred on 10 · t ms.

    The same bands and the same hop as Whisper's feature extractor, without its padding to 30 s and its scale.
    """
    if wave.ndim != 1 or len(wave) < HOP:
        raise WinnowError(f"log_mel: got a wave of shape {wave.shape}; allowed: one channel of at least {HOP} samples.")
    padded = np.pad(wave, WINDOW // 2, mode="reflect" if len(wave) > WINDOW // 2 else "constant")
    frames = len(wave) // HOP
    at = np.arange(frames)[:, None] * HOP + np.arange(WINDOW)
    spectrum = np.abs(np.fft.rfft(padded[at] * np.hanning(WINDOW + 1)[:-1])) ** 2
    return np.log10(np.maximum(spectrum @ _filters(bands).T, FLOOR))


def mel_tokens(wave: Wave, each: int = 4, bands: int = BANDS) -> Float[np.ndarray, "tokens bands"]:
    """The means of `each` frames that follow one another, whole ones only."""
    mels = log_mel(wave, bands)
    return mels[: len(mels) // each * each].reshape(-1, each, mels.shape[1]).mean(1)


@functools.cache
def _filters(bands: int) -> Float[np.ndarray, "bands bins"]:
    """Triangles over the bins of the spectrum, evenly spread over the mel scale, each of the same area."""
    edges = _hertz(np.linspace(_mel(np.array(0.0)), _mel(np.array(RATE / 2)), bands + 2))
    bins = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    rise = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rise, fall)) * (2 / (edges[2:] - edges[:-2]))[:, None]


# Slaney's scale: linear below 1,000 Hz, logarithmic above.
_BREAK, _STEP = 15.0, np.log(6.4) / 27


def _mel(hertz: np.ndarray) -> np.ndarray:
    return np.where(hertz < 1000, hertz * 3 / 200, _BREAK + np.log(np.maximum(hertz, 1e-9) / 1000) / _STEP)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _BREAK, mel * 200 / 3, 1000 * np.exp(_STEP * (mel - _BREAK)))
