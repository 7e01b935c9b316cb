"""Decoded tokens of which later layers read few slots: nothing is dropped, and the next token can read others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import winnow
from tests import kvhand
from winnow.contract import Attend, CacheMethod, KVBudget, KVStep, Observe, Point, Reduction, State, register
from winnow.core.errors import WinnowError

STEPS = torch.randint(2, 120, (3, 6), generator=torch.Generator().manual_seed(5))
LENGTHS = (19, 26, 11)


def read(n: int) -> torch.Tensor:
    """Every second slot from the end for even n, every third for odd."""
    return torch.arange(n).flip(0) % (2 + n % 2) == 0


@register("a-few-slots", stages=("cache",))
class FewSlots(CacheMethod):
    """From the second layer on, decoded tokens read every second or third slot."""

    keep: KVBudget = KVBudget("100%")
    own: bool = True

    def few(self, view: Any, state: State) -> Any:
        if view.n % 5 == 0:
            return Observe(), state
        kept = read(view.n)
        kept[-1] &= self.own
        return Attend(Reduction.select(kept.expand(view.b, -1))), state

    def steps(self, info: Any) -> tuple[KVStep, ...]:
        return (KVStep(Point("kv", 0), self.few, when=("decode",)),)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(19,), LENGTHS])
def test_later_layers_read_what_one_layer_chose_for_this_token(kind: str, lengths: tuple[int, ...]) -> None:
    model: Any = kvhand.text_model("llama")
    inputs, steps = kvhand.prompt(lengths), STEPS[: len(lengths)]
    model.set_attn_implementation(kind)
    with winnow.compress(model, "a-few-slots"):
        got = kvhand.written(model, inputs, steps)
    width = max(lengths)

    def gone(layer: int, n: int) -> torch.Tensor | None:
        if layer == 0 or n <= width:
            return None
        hidden = torch.zeros(len(lengths), 2, n, dtype=torch.bool)
        for row, own in enumerate(lengths):
            held = own + n - width
            if held % 5:
                hidden[row, :, n - held :] = ~read(held)
        return hidden

    with kvhand.evicting(model, gone):
        wanted = kvhand.written(model, inputs, steps)
    plain = kvhand.written(model, inputs, steps)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (got.logits[-1] - plain.logits[-1]).abs().max() > 1e-3
    assert all(layer.store.length == layer.seen and not layer.changed for layer in got.past_key_values.layers)


def test_a_map_without_the_token_itself_is_refused() -> None:
    model: Any = kvhand.text_model("llama")
    with winnow.compress(model, "a-few-slots:own=false"), pytest.raises(WinnowError, match="its own, included"):
        kvhand.written(model, kvhand.prompt((19,)), STEPS[:1])
