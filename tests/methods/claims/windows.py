"""A claim about lengths beyond those of training, asked of the recall model: its texts stand for visual tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tests.methods.directional import Sample
from winnow.core.stretch import Stretch
from winnow.reference import text
from winnow.world.recall import draw

from .finding import Finding, compared

TRAINED = 512  # tokens of the texts that it was trained on


@torch.no_grad()
def likelihoods(scale: float, n: int, length: int = 4 * TRAINED - 64) -> np.ndarray:
    """`[n]` the logarithm of how likely the model holds the right answers about pairs in texts of a length."""
    model, _ = text.load()
    stretch, rotary = Stretch(scale, TRAINED), model.model.rotary_emb
    rotary.inv_freq = stretch.frequencies(rotary.inv_freq)
    rotary.attention_scaling *= stretch.temperature
    found = []
    for seed in range(n):
        sample = draw("pairs", seed, length, "test")
        (asked,) = sample.asked
        ids = torch.tensor([sample.context + asked.question])
        found.append(float(model(ids, logits_to_keep=1).logits[0, -1].log_softmax(-1)[asked.answer[0]]))
    return np.array(found)


def extension(s: Sample, rolled: Sample) -> Iterator[Finding]:
    n = 24
    what = f"{n} texts of 1984 tokens for a model trained on {TRAINED}, log-likelihood of the answer"
    claim = "four times beyond the trained length, stretched positions answer better"
    names = ("stretched", "as trained")
    yield compared("visual-context-window-extension", claim, what, names, likelihoods(4, n), likelihoods(1, n))


CLAIMS = {"visual-context-window-extension": extension}
