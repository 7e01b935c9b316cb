"""Compressed caches step by step: what a layer had evicted before each token, and the same masked in a full cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import winnow
from tests import kvhand, zoo
from winnow.contract import CacheMethod, KVReduce, KVView, State

Gone = dict[tuple[int, int], Tensor]

LENGTHS = (19, 26, 11)
BUILDS = ("llama", "llava_clip", "qwen2_5_vl")


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


def words(steps: int, seed: int = 5) -> Tensor:
    """`[3, steps]` tokens to write."""
    return torch.randint(5, 120, (3, steps), generator=torch.Generator().manual_seed(seed))


def close(got: Iterable[Tensor], wanted: Iterable[Tensor], atol: float = 1e-5) -> None:
    """Logits of one step after the other are the same."""
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5, msg=lambda m, step=step: f"step {step}: {m}")


class Case(NamedTuple):
    """A model, a left-padded batch, and its samples alone."""

    model: Any
    inputs: dict[str, Tensor]
    alone: Sequence[dict[str, Tensor]] = ()

    def check_evictions(self, plan: Any, tokens: Tensor) -> tuple[Any, Gone]:
        """Logits under a plan are those of the full cache with what was evicted before each token masked from then on.

        Something is evicted in the prompt already, and all that is evicted makes a difference.
        """
        model, inputs, _ = self
        with winnow.compress(model, plan), recorded(model) as gone:
            got = kvhand.written(model, inputs, tokens)
        assert len({read for _, read in gone}) == tokens.shape[1]
        with kvhand.evicting(model, lambda layer, n: gone.get((layer, n - 1))):
            wanted = kvhand.written(model, inputs, tokens)
        close(got.logits, wanted.logits)
        plain = kvhand.written(model, inputs, tokens)
        assert (got.logits[-1] - plain.logits[-1]).abs().max() > 1e-3
        return got, gone

    def check_batch(self, plan: Any, tokens: Tensor, atol: float = 2e-5) -> None:
        """Each sample of the batch is written as if it were alone."""
        assert self.alone
        with winnow.compress(self.model, plan):
            batch = kvhand.written(self.model, self.inputs, tokens)
            for row, one in enumerate(self.alone):
                single = kvhand.written(self.model, one, tokens[row : row + 1])
                close([x[row] for x in batch.logits], [x[0] for x in single.logits], atol)

    def check_maps(self, method: CacheMethod, tokens: Tensor) -> list[KVReduce]:
        """Decoded tokens read what the maps of each sample's prompt make of its full cache. Returns the maps."""
        model, inputs, _ = self
        lengths, prompt = inputs["attention_mask"].sum(1).tolist(), inputs["input_ids"].shape[1]
        assert len(set(lengths)) == len(lengths)  # so that each sample is a group
        done: dict[tuple[int, int], Any] = {}
        evict = type(method).evict

        def noting(own: CacheMethod, view: KVView, state: State) -> Any:
            action, state = evict(own, view, state)
            done[view.layer, view.n] = action
            return action, state

        with mock.patch.object(type(method), "evict", noting), winnow.compress(model, method):
            got = kvhand.written(model, inputs, tokens)

        def held(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            made = [torch.zeros_like(x) for x in (keys, values)]
            added = torch.full(keys.shape[:3], -torch.inf)
            for row, n in enumerate(lengths):
                action = done[layer, n]
                for out, x, chosen in ((made[0], keys, action.k), (made[1], values, action.v)):
                    old = chosen.to_matrix()[0] @ x[row, :, prompt - n : prompt]
                    new = torch.cat([old, x[row, :, prompt:]], 1)
                    out[row, :, : new.shape[1]] = new
                    added[row, :, : new.shape[1]] = 0
            return made[0], made[1], added

        with kvhand.holding(model, held):
            wanted = kvhand.written(model, inputs, tokens)
        close(got.logits, wanted.logits)
        return [action for (_, n), action in done.items() if n in lengths]


def case(build: str, layers: int = 3, ids: Tensor | None = None) -> Case:
    """Three samples of unequal length, on a build of the zoo or on a text model of so many layers.

    Args:
        ids: `[3, 26]` the tokens that the text model reads; default: random ones.
    """
    if build not in kvhand.TEXTS:
        return Case(zoo.model(build), zoo.inputs(build, zoo.RAGGED), zoo.samples(build, zoo.RAGGED))
    inputs = kvhand.prompt(LENGTHS)
    if ids is not None:
        inputs["input_ids"] = ids * inputs["attention_mask"]
    alone = [{k: v[row : row + 1, -n:] for k, v in inputs.items()} for row, n in enumerate(LENGTHS)]
    return Case(kvhand.text_model(build, layers=layers), inputs, alone)


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
