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
def recalled(scale: float, n: int, length: int = 4 * TRAINED - 64) -> np.ndarray:
    """`[n]` the share of the 24 pairs in a text of a length that the model answers right, each asked by itself."""
    model, _ = text.load()
    stretch, rotary = Stretch(scale, TRAINED), model.model.rotary_emb
    rotary.inv_freq = stretch.frequencies(rotary.inv_freq)
    rotary.attention_scaling *= stretch.temperature
    found = []
    for seed in range(n):
        sample = draw("pairs", seed, length, "test", asks=24)
        cache = model(torch.tensor([sample.context]), logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(sample.asked))
        questions = torch.tensor([asked.question for asked in sample.asked])
        said = model(questions, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
        found.append(float((said == torch.tensor([asked.answer[0] for asked in sample.asked])).float().mean()))
    return np.array(found)


def extension(s: Sample, rolled: Sample) -> Iterator[Finding]:
    n = 16
    what = f"24 pairs in each of {n} texts of 1984 tokens, for a model trained on {TRAINED}, answered right"
    claim = "four times beyond the trained length, stretched positions answer more"
    yield compared(
        "visual-context-window-extension", claim, what, ("stretched", "as trained"), recalled(4, n), recalled(1, n)
    )


CLAIMS = {"visual-context-window-extension": extension}
