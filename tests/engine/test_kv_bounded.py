"""Bounded caches: keys and values lie where they were allocated behind the prompt, whatever is decoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import winnow
from tests import kvhand, zoo
from winnow.core.errors import UnsupportedError, WinnowError

NEW = 12
STEPS = torch.randint(2, 120, (3, NEW), generator=torch.Generator().manual_seed(5))
# Plan, and the slots of a head for which there is room behind a prompt of 24 tokens.
ROOMS = {
    "snapkv:keep=12,window=4": 12 + NEW,
    "snapkv:keep=100%": 24 + NEW,
    "snapkv:keep=16,window=4,limit=12,every=5": 17,
    "h2o:keep=50%,limit=10,every=2": 13,
    "streaming-llm:keep=12,limit=8,shift=true": 13,
    "snapkv:keep=50%,window=4 + streaming-llm:keep=6,limit=8,every=4": 12,
}


def places(cache: Any) -> list[int]:
    return [x.data_ptr() for layer in cache.layers for x in (layer.store._keys, layer.store._values)]


@pytest.mark.parametrize("plan", ROOMS)
def test_a_decoded_token_moves_nothing(plan: str) -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((24, 24, 24))
    with winnow.compress(model, plan) as handle:
        wanted = kvhand.written(model, inputs, STEPS)
        cache = handle.bounded_cache(NEW)
        first = kvhand.written(model, inputs, STEPS[:, :1], past_key_values=cache)
        before = places(cache)
        got = [first.logits[0]]
        with torch.no_grad():
            for step in range(NEW - 1):
                got.append(model(input_ids=STEPS[:, step : step + 1], past_key_values=cache).logits[:, -1])
                assert places(cache) == before
    assert {layer.store.capacity for layer in cache.layers} == {ROOMS[plan]}
    for a, b in zip(got, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", ["llava_next", "qwen2_5_vl"])
def test_in_a_batch_of_unequal_samples_with_pictures(build: str) -> None:
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, "divprune:keep=50% + snapkv:keep=40%,window=4") as handle:
        wanted = kvhand.written(model, inputs, STEPS)
        got = kvhand.written(model, inputs, STEPS, past_key_values=handle.bounded_cache(NEW))
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_later_turn_allocates_again_and_goes_on() -> None:
    model, inputs, later = kvhand.text_model("llama"), kvhand.prompt((24,)), kvhand.prompt((40,), seed=3)["input_ids"]
    found = []
    with winnow.compress(model, "snapkv:keep=50%,window=4") as handle, torch.no_grad():
        for cache in (handle.bounded_cache(4), None):
            cache = model(**inputs, past_key_values=cache, use_cache=True).past_key_values
            for ids in (later, STEPS[:1, :1], STEPS[:1, 1:2]):
                logits = model(input_ids=ids, past_key_values=cache).logits
            found.append((logits, cache))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1].layers[0].store.capacity == 12 + 20 + 4


def test_what_has_no_bound_is_refused() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((24,))
    for plan in ("adakv:base=snapkv:window=4,keep=40%", "kv-quantized:bits=4,group=16"):
        slug = plan.partition(":")[0]
        with winnow.compress(model, plan) as handle, pytest.raises(UnsupportedError, match=f"use {slug} with"):
            model(**inputs, past_key_values=handle.bounded_cache(4))
    with winnow.compress(model, "snapkv:keep=12,window=4") as handle:
        with pytest.raises(WinnowError, match="at least 1"):
            handle.bounded_cache(0)
        with pytest.raises(WinnowError, match="room for 14 slots"):
            kvhand.written(model, inputs, STEPS[:1], past_key_values=handle.bounded_cache(2))
        with handle.using("full"), pytest.raises(WinnowError, match="leaves the cache alone"):
            handle.bounded_cache(2)
