"""Compressed caches step by step: what a layer had evicted before each token, and the same masked in a full cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import winnow
from tests import kvhand, zoo

Gone = dict[tuple[int, int], Tensor]


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[Gone]:
    """Fills in, for (layer, tokens read), what a compressed layer no longer holds then: `[B, G, n]`."""
    found: Gone = {}

    def after(module: Any, args: Any, output: Any) -> None:
        cache = output.past_key_values
        for layer, gone in kvhand.evicted_of(cache).items():
            found[layer, cache.layers[layer].seen] = gone

    handle = model.register_forward_hook(after)
    try:
        yield found
    finally:
        handle.remove()


def check_against_masked(model: Any, inputs: dict[str, Tensor], plan: Any, tokens: Tensor) -> tuple[Any, Gone]:
    """Logits under a plan equal those of the full cache with what was evicted before each token masked from then on."""
    with winnow.compress(model, plan), recorded(model) as gone:
        got = kvhand.written(model, inputs, tokens)
    with kvhand.evicting(model, lambda layer, n: gone.get((layer, n - 1))):
        wanted = kvhand.written(model, inputs, tokens)
    plain = kvhand.written(model, inputs, tokens)
    for step, (a, b) in enumerate(zip(got.logits, wanted.logits, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m, step=step: f"step {step}: {m}")
    assert (got.logits[-1] - plain.logits[-1]).abs().max() > 1e-3  # something was really dropped
    return got, gone


def check_batch(
    model: Any, inputs: dict[str, Tensor], alone: list[dict[str, Tensor]], plan: Any, tokens: Tensor
) -> None:
    """Each sample of a left-padded batch is written as if it were alone."""
    with winnow.compress(model, plan):
        batch = kvhand.written(model, inputs, tokens)
        for row, one in enumerate(alone):
            single = kvhand.written(model, one, tokens[row : row + 1])
            for a, b in zip(batch.logits, single.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def heard(model: Any, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of each layer in a plain prefill, as its attention function gets them."""
    found: list[tuple[Tensor, Tensor]] = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        found.append((query.clone(), key.clone()))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("kvheard", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("kvheard")
    try:
        model(**inputs)
    finally:
        model.set_attn_implementation(before)
    return found


def model_and_inputs(build: str) -> tuple[Any, dict[str, Tensor], list[dict[str, Tensor]]]:
    """A model, a left-padded batch of three samples, and each of them alone."""
    if build in kvhand.TEXTS:
        lengths = (19, 26, 11)
        inputs = kvhand.prompt(lengths)
        alone = [{k: v[row : row + 1, -n:] for k, v in inputs.items()} for row, n in enumerate(lengths)]
        return kvhand.text_model(build), inputs, alone
    return zoo.model(build), zoo.inputs(build, zoo.RAGGED), zoo.samples(build, zoo.RAGGED)
