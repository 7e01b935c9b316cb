"""Stretched rotary frequencies: beside a loop over pairs, and beside transformers' own YaRN where both say the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from winnow.core.errors import WinnowError
from winnow.core.stretch import Stretch, frequencies_naive

BASE, WINDOW = 1e6, 6272
OWN = BASE ** -(torch.arange(64) / 64)


@pytest.mark.system("visual-context-window-extension", "exact")
@given(st.floats(1, 64), st.integers(1, 100_000))
def test_frequencies_are_those_of_a_loop(scale, window):
    stretch = Stretch(scale, window)
    want = torch.tensor(frequencies_naive(OWN.double().tolist(), stretch))
    assert torch.allclose(stretch.frequencies(OWN), want.float(), rtol=1e-5)


@pytest.mark.system("visual-context-window-extension", "exact")
def test_at_scale_1_nothing_changes():
    assert torch.equal(Stretch(1, WINDOW).frequencies(OWN), OWN)
    assert Stretch(1, WINDOW).temperature == 1


@pytest.mark.system("visual-context-window-extension", "exact")
def test_the_highest_frequency_stays_and_the_lowest_is_divided():
    made = Stretch(4, WINDOW).frequencies(OWN)
    assert float(made[0]) == float(OWN[0])
    assert float(made[-1]) == pytest.approx(float(OWN[-1]) / 4)
    assert bool((made <= OWN).all())
    assert bool((made.diff() < 0).all())
    assert Stretch(4, WINDOW).temperature == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.system("visual-context-window-extension", "exact")
def test_where_it_does_not_blend_it_is_what_transformers_gives():
    """Between the two bounds, that code goes linearly in the number of the pair, and the paper in its turns."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": BASE,
        "factor": 4.0,
        "original_max_position_embeddings": WINDOW,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, rope_parameters=rope, max_position_embeddings=WINDOW)
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    stretch = Stretch(4, WINDOW)
    turns = WINDOW * OWN / (2 * math.pi)
    same = (turns > 40) | (turns < 0.8)
    assert 20 < int(same.sum()) < 64
    assert torch.allclose(stretch.frequencies(OWN)[same], theirs[same], rtol=1e-5)
    assert factor == pytest.approx(stretch.temperature)


@pytest.mark.parametrize("values", [(0.5, 10), (torch.inf, 10), (torch.nan, 10), (2, 0), (2, 10, 3, 3), (2, 10, -1)])
def test_what_is_no_stretch_is_refused(values):
    with pytest.raises(WinnowError, match="allowed: a scale from 1"):
        Stretch(*values)
