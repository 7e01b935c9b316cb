"""Offloaded caches under a plan: what a layer holds lies on the CPU between its attentions, and no answer changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import winnow
from tests import kvhand
from tests.devices import CPU, FIRST, Devices, device_of
from tests.engine.test_modes import Stream
from winnow.cache.layer import HeldLayer
from winnow.core.errors import UnsupportedError

PLANS = (
    "snapkv:keep=40%,window=4",
    "adakv:base=snapkv:window=4,keep=40%",
    "h2o:keep=50%,limit=12,every=2",
    "kv-quantized:bits=4,group=16,every=4",
)
STEPS = torch.randint(2, 120, (3, 5), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", Stream)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What happens, in order: a layer comes, attends or leaves."""
    seen: list[tuple[str, int]] = []
    bring, attend = HeldLayer._bring_to, HeldLayer.attend

    def bringing(self: HeldLayer, device: torch.device) -> None:
        seen.append(("comes" if self.away else "leaves", self.index))
        bring(self, device)

    def attending(self: HeldLayer, *given: Any) -> Any:
        assert not self.away
        seen.append(("attends", self.index))
        return attend(self, *given)

    monkeypatch.setattr(HeldLayer, "_bring_to", bringing)
    monkeypatch.setattr(HeldLayer, "attend", attending)
    return seen


@pytest.mark.parametrize("plan", PLANS)
def test_the_answers_are_those_of_the_same_cache_at_home(plan: str) -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((19, 26, 11))
    with winnow.compress(model, plan):
        wanted = kvhand.written(model, inputs, STEPS)
        got = kvhand.written(model, inputs, STEPS, cache_implementation="offloaded")
    assert got.past_key_values.offloading
    store = got.past_key_values.layers[0].store
    assert type(store).__name__ == {"adakv": "Ragged", "kv-quantized": "Coded"}.get(plan.partition(":")[0], "Dense")
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))


def test_each_layer_comes_before_it_attends_and_leaves_behind_it(moves: list[tuple[str, int]]) -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((24,))
    with winnow.compress(model, "snapkv:keep=40%,window=4"):
        kvhand.written(model, inputs, STEPS[:1, :3], cache_implementation="offloaded")
    prefill = [(what, k) for k in range(3) for what in ("attends", "leaves")]
    prefill.insert(4, ("comes", 0))  # the last layer sends for the first one
    token = [(what, k + (what == "comes")) for k in range(2) for what in ("comes", "attends", "leaves")]
    token += [("comes", 0), ("attends", 2), ("leaves", 2)]
    assert moves == prefill + 2 * token


@pytest.fixture
def devices() -> Iterator[None]:
    with Devices():
        yield


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("plan", PLANS)
def test_between_tokens_one_layer_is_on_the_device(plan: str) -> None:
    model = accelerate.dispatch_model(
        kvhand.text_model("llama"), {"": str(FIRST)}, main_device=str(FIRST), force_hooks=True
    )
    inputs = {name: x.to(str(FIRST)) for name, x in kvhand.prompt((19, 26, 11)).items()}
    with winnow.compress(model, plan):
        wanted = kvhand.written(model, inputs, STEPS.to(str(FIRST)))
        got = kvhand.written(model, inputs, STEPS.to(str(FIRST)), cache_implementation="offloaded")
    for layer in got.past_key_values.layers:
        places = {device_of(x) for x in layer.tensors()}
        assert places == ({FIRST} if layer.index == 0 else {CPU})
    assert all(device_of(x) == FIRST for layer in wanted.past_key_values.layers for x in layer.tensors())
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))


def test_a_later_turn_and_a_crop_go_on_with_what_is_away() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((24,))
    later = kvhand.prompt((5,), seed=3)["input_ids"]

    def logits(**options: Any) -> Tensor:
        cache = kvhand.written(model, inputs, STEPS[:1, :3], **options).past_key_values
        cache.crop(-2)
        with torch.no_grad():
            return model(input_ids=later, past_key_values=cache).logits

    with winnow.compress(model, "snapkv:keep=40%,window=4"):
        assert torch.equal(logits(cache_implementation="offloaded"), logits())


def test_two_layers_that_are_stored_together_are_refused() -> None:
    model, inputs = kvhand.text_model("llama", layers=4), kvhand.prompt((24,))
    with (
        winnow.compress(model, "minicache"),
        pytest.raises(UnsupportedError, match="stores two layers together"),
    ):
        kvhand.written(model, inputs, STEPS[:1, :3], cache_implementation="offloaded")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing lies apart from the CPU")
@pytest.mark.parametrize("plan", PLANS)
def test_on_a_gpu(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = kvhand.text_model("llama").cuda()
    inputs = {name: x.cuda() for name, x in kvhand.prompt((419, 426, 311)).items()}
    with winnow.compress(model, plan):
        wanted = kvhand.written(model, inputs, STEPS.cuda())
        got = kvhand.written(model, inputs, STEPS.cuda(), cache_implementation="offloaded")
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))
