"""Codecs on models: a batch under a plan equals each sample with a plain cache that is changed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import winnow
from tests import kvhand, zoo
from winnow.contract import Codec, KVView, Method, ModelInfo, State

LENGTHS = (19, 26, 12, 19)
STEPS = torch.randint(2, 120, (4, 11), generator=torch.Generator().manual_seed(5))


def model_of(build: str) -> Any:
    layers = 3 if build == "gemma3" else 4
    return kvhand.text_model(build, layers) if build in kvhand.TEXTS else zoo.model(build)


def batch_and_singles(build: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Four samples, two of them of one length, left-padded; and each by itself."""
    if build in kvhand.TEXTS:
        batch = kvhand.prompt(LENGTHS)
        return batch, [{k: v[row : row + 1, -n:] for k, v in batch.items()} for row, n in enumerate(LENGTHS)]
    rows = (*zoo.RAGGED, zoo.RAGGED[0])
    return zoo.inputs(build, rows), zoo.samples(build, rows)


def codecs_of(method: Method, depth: int = 4) -> Callable[[int], Codec | None]:
    """The codec that a method asks for in each layer."""
    steps = {step.at.index: step for step in method.steps(ModelInfo(depth=depth))}
    dummy = torch.zeros(1, 1, 1, 1)
    found = {k: step.run(KVView.of(dummy, dummy, layer=k, depth=depth), State())[0] for k, step in steps.items()}  # type: ignore[arg-type,index]
    return lambda index: found.get(index)  # type: ignore[return-value]


def check_against_changed(build: str, plan: str, codec: Callable[[int], Codec | None]) -> None:
    """A left-padded batch under a plan equals each sample with a plain cache that was changed by hand."""
    model = model_of(build)
    batch, alone = batch_and_singles(build)
    with winnow.compress(model, plan):
        got = kvhand.written(model, batch, STEPS).logits
    for row, one in enumerate(alone):
        wanted = kvhand.stepped(model, one, STEPS[row], kvhand.coding(codec))
        for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
            torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=1e-5, msg=lambda m, s=step: f"step {s}: {m}")
    plain = kvhand.stepped(model, one, STEPS[row], lambda cache: None)
    assert (plain[-1] - wanted[-1]).abs().max() > 1e-3


def check_with_eviction(eviction: str, plan: str, codec: Callable[[int], Codec | None]) -> Any:
    """After an eviction a codec gives what a cache does that holds the kept slots alone, as they are read back."""
    model, inputs = model_of("llama"), kvhand.prompt((26,))
    with winnow.compress(model, eviction):
        gone = kvhand.evicted_of(kvhand.written(model, inputs, STEPS[:1, :1]).past_key_values)
    kept = {layer: torch.stack([(~head).nonzero()[:, 0] for head in own[0]]) for layer, own in gone.items()}
    with winnow.compress(model, f"{eviction} + {plan}"):
        got = kvhand.written(model, inputs, STEPS[:1])
    wanted = kvhand.stepped(model, inputs, STEPS[0], kvhand.coding(codec, kept))
    for a, b in zip(got.logits, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    return got
