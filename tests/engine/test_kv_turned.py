"""Rotations of keys and queries, and plans with two steps of the cache in one forward."""

from __future__ import annotations

import pytest
import torch

import winnow
from tests import kvhand
from winnow.cache.rotary import Rotary


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_mean_of_many_turns(interleaved: bool) -> None:
    rotary = Rotary(50.0 ** (-torch.arange(6) / 6), interleaved)  # of 16 channels, 4 are not rotated
    x, shifts = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4, 9, -2])
    turned = [rotary.turn(x, torch.full((2, 3, 5), shift)) for shift in shifts.tolist()]
    torch.testing.assert_close(rotary.turn_on_average(x, shifts), sum(turned) / 4)
    assert torch.equal(rotary.turn(x, torch.zeros(1, 1, 5, dtype=torch.int64)), x)


@torch.no_grad()
@pytest.mark.parametrize("build", list(kvhand.TEXTS))
def test_keys_of_every_class_can_be_moved(build: str) -> None:
    """A prompt that begins 11 positions later has the same keys, turned; of layers that attend to everything."""
    model = kvhand.text_model(build, layers=1)
    ids = kvhand.prompt((7,))["input_ids"]
    here, there = (
        model(input_ids=ids, position_ids=torch.arange(7)[None] + by, use_cache=True).past_key_values.layers[0].keys
        for by in (0, 11)
    )
    rotary = Rotary.of(model.model, model.model.layers[0].self_attn)
    assert rotary is not None
    torch.testing.assert_close(rotary.turn(here, torch.full((1, 1, 7), 11)), there, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_second_method_sees_what_the_first_one_left() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((26, 26, 19))
    with winnow.compress(model, "streaming-llm:keep=12 + knorm:keep=5"):
        both = model(**inputs).past_key_values
    with winnow.compress(model, "streaming-llm:keep=12"):
        first = model(**inputs).past_key_values
    for one, two in zip(first.layers, both.layers, strict=True):
        keys, slots = one.store.read()[0], one.store.slots
        short = keys.norm(dim=-1).argsort(-1)[..., :5].sort(-1).values
        assert torch.equal(two.store.slots, slots.gather(2, short))
