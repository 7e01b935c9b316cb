"""Checks that cache methods share: decoding under a plan against the full cache with what was evicted masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import winnow
from tests import kvhand, zoo
from winnow.contract import KVView

LENGTHS = (19, 26, 11)
BUILDS = ("llama", "llava_clip", "qwen2_5_vl")


def model_of(build: str) -> Any:
    return kvhand.text_model(build, layers=2) if build in kvhand.TEXTS else zoo.model(build)


def batch_of(build: str) -> dict[str, Tensor]:
    """Samples of unequal length, padded in front."""
    return kvhand.prompt(LENGTHS) if build in kvhand.TEXTS else zoo.inputs(build, zoo.RAGGED)


def singles_of(build: str) -> list[dict[str, Tensor]]:
    if build not in kvhand.TEXTS:
        return zoo.samples(build, zoo.RAGGED)
    whole = batch_of(build)
    return [{k: v[row : row + 1, -n:] for k, v in whole.items()} for row, n in enumerate(LENGTHS)]


def words(steps: int, seed: int = 5) -> Tensor:
    return torch.randint(5, 120, (3, steps), generator=torch.Generator().manual_seed(seed))


def close(got: Any, wanted: Any, atol: float = 1e-5) -> None:
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-5, msg=lambda m, step=step: f"step {step}: {m}")


def check_evictions(build: str, plan: Any, steps: int = 6) -> None:
    """Each step reads what the evictions until then left, and nothing else."""
    model, inputs, tokens = model_of(build), batch_of(build), words(steps)
    with winnow.compress(model, plan):
        out, gone = kvhand.watched(model, inputs, tokens)
    got = out.logits
    assert all(gone.values())
    with kvhand.evicting(model, lambda layer, n: gone.get(n - 1, {}).get(layer)):
        wanted = kvhand.written(model, inputs, tokens).logits
    close(got, wanted)
    plain = kvhand.written(model, inputs, tokens).logits
    assert (got[-1] - plain[-1]).abs().max() > 1e-3


def check_batch(build: str, plan: Any, steps: int = 6) -> None:
    """A padded batch equals its samples."""
    model, tokens = model_of(build), words(steps)
    with winnow.compress(model, plan):
        batch = kvhand.written(model, batch_of(build), tokens)
        for row, one in enumerate(singles_of(build)):
            single = kvhand.written(model, one, tokens[row : row + 1])
            close([x[row] for x in batch.logits], [x[0] for x in single.logits], 2e-5)


def view_of(
    b: int = 1,
    g: int = 2,
    n: int = 40,
    d: int = 8,
    group: int = 2,
    rows: int | None = None,
    seed: int = 0,
    **known: Any,
) -> KVView:
    """Random keys, values and queries, peaky enough that scores differ."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(b, g, n, d, generator=generator) for _ in range(2))
    queries = 2 * torch.randn(b, g * group, rows or n, d, generator=generator)
    return KVView.of(keys, values, queries, **known)


def attention_by_hand(view: KVView) -> Tensor:
    """`[b, H, q, N]` causal attention of the newest queries, row by row."""
    b, h, q, _ = view.queries.shape
    out = torch.zeros(b, h, q, view.n, dtype=torch.float64)
    for row in range(q):
        seen = view.n - q + row + 1
        for head in range(h):
            keys = view.keys[:, head // view.group, :seen].double()
            logits = (keys @ view.queries[:, head, row, :, None].double())[..., 0] * view.scaling
            out[:, head, row, :seen] = logits.softmax(-1)
    return out
