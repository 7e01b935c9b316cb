"""Caches in another form: as a plain cache whose slots are what the form gives back; shared storage counts once."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import winnow
from tests import kvhand
from tests.coded import STEPS, batch_and_singles, check_against_changed, check_with_eviction, codecs_of, model_of
from winnow.cache.blocks import Coded
from winnow.cache.layer import held_bytes
from winnow.contract import Action, CacheMethod, Codec, KVStep, KVView, ModelInfo, Point, State, register
from winnow.core.errors import WinnowError
from winnow.parts.forms import Both, Form, Plain
from winnow.parts.shared import Shared


@dataclass(frozen=True, eq=False)
class Coarse(Form):
    """A tensor in steps of a quarter, as bytes."""

    codes: Tensor
    dtype: torch.dtype

    def read(self) -> Tensor:
        return self.codes.to(self.dtype) / 4


def coarse(x: Tensor) -> Coarse:
    return Coarse((x * 4).round().clamp(-127, 127).to(torch.int8), x.dtype)


@register("a-coarse-cache", stages=("cache",))
class CoarseCache(CacheMethod):
    """Stores keys and values in steps of a quarter."""

    identity = None
    every: int = 4

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        return Codec(self.encode, every=self.every, multiple=max(1, self.every)), state

    def encode(self, keys: Tensor, values: Tensor) -> Both:
        return Both(coarse(keys), coarse(values), keys.shape[2])


@register("a-shared-cache", stages=("cache",))
class SharedCache(CacheMethod):
    """Stores the mean of two layers."""

    identity = None
    every: int = 3

    def steps(self, info: ModelInfo) -> tuple[KVStep, ...]:
        return tuple(KVStep(Point("kv", k), self.evict) for k in range(1, info.depth, 2))  # type: ignore[arg-type]

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        return Codec(self.encode, every=self.every, pair=True), state

    def encode(self, below_k: Tensor, below_v: Tensor, keys: Tensor, values: Tensor) -> tuple[Both, Both]:
        block = Both(Plain((below_k + keys) / 2), Plain((below_v + values) / 2), keys.shape[2])
        return block, block


METHODS = {"a-coarse-cache": CoarseCache(), "a-shared-cache": SharedCache()}


@pytest.mark.parametrize("build", ["llama", "llava_clip", "llava_next"])
@pytest.mark.parametrize("plan", ["a-coarse-cache", "a-shared-cache"])
def test_a_padded_batch_equals_each_sample_with_a_cache_that_was_changed_by_hand(build: str, plan: str) -> None:
    check_against_changed(build, plan, codecs_of(METHODS[plan]))


EVICTED = "snapkv:keep=50%,window=4 + a-coarse-cache"


@pytest.mark.parametrize(
    ("build", "plan"),
    [(b, p) for b in ("llama", "gemma3", "qwen2_5_vl") for p in ("a-coarse-cache", EVICTED)]
    + [("qwen2_5_vl", "a-shared-cache")],
)
def test_a_batch_equals_its_samples(build: str, plan: str) -> None:
    model = model_of(build)
    batch, alone = batch_and_singles(build)
    with winnow.compress(model, plan):
        together = kvhand.written(model, batch, STEPS).logits
        for row, one in enumerate(alone):
            single = kvhand.written(model, one, STEPS[row : row + 1]).logits
            for a, b in zip(together, single, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=1e-5)


def test_eviction_and_a_codec_equal_the_kept_slots_read_back() -> None:
    got = check_with_eviction("snapkv:keep=50%,window=4", "a-coarse-cache", codecs_of(CoarseCache()))
    store = got.past_key_values.layers[0].store
    assert isinstance(store, Coded)
    assert store.lots[0].coded == 20  # 13 slots are left of 26: 12 and, of the one and ten more, 8


@torch.no_grad()
@pytest.mark.parametrize("plan", ["a-coarse-cache", "a-shared-cache"])
def test_a_later_turn_waits_in_the_tail_also_where_it_is_padded(plan: str) -> None:
    model = kvhand.text_model("llama", layers=4)
    first, later = kvhand.prompt((9, 14)), kvhand.prompt((6, 3), seed=4)
    with winnow.compress(model, plan):
        tokens, cache, mask = STEPS[:2, :1], None, first["attention_mask"][:, :0]
        for ids, own in (*(tuple(turn.values()) for turn in (first, later)), (tokens, torch.ones_like(tokens))):
            mask = torch.cat([mask, own], 1)
            at = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            out = model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache)
            cache = out.past_key_values
        got = out.logits
        store = cache.layers[1].store
        assert [lot.length for lot in store.lots] == [9 + 6 + 1, 14 + 3 + 1]
        for row, (a, b) in enumerate(((9, 6), (14, 3))):
            one = model(input_ids=first["input_ids"][row : row + 1, -a:]).past_key_values
            model(input_ids=later["input_ids"][row : row + 1, -b:], past_key_values=one)
            wanted = model(input_ids=tokens[row : row + 1], past_key_values=one).logits
            torch.testing.assert_close(got[row], wanted[0], atol=2e-5, rtol=1e-5)
    slots = store.slots_at(cache.layers[1].seen)
    assert slots[0, 0, -7:].tolist() == list(range(14, 21))
    assert slots[1, 0, -4:].tolist() == [17, 18, 19, 20]


@torch.no_grad()
@pytest.mark.parametrize("plan", ["a-coarse-cache", "a-shared-cache"])
@pytest.mark.parametrize("lengths", [(14,), (14, 9)])
def test_crop_takes_the_tail_back_and_refuses_blocks(plan: str, lengths: tuple[int, ...]) -> None:
    model, inputs = kvhand.text_model("llama", layers=4), kvhand.prompt(lengths)
    tokens = kvhand.prompt((2,) * len(lengths), seed=3)["input_ids"]

    def read(cache: Any, column: int) -> Tensor:
        seen = cache.get_seq_length() - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, seen + 1), value=1)
        at = mask.cumsum(1)[:, -1:] - 1
        given = {"attention_mask": mask, "position_ids": at, "past_key_values": cache}
        return model(input_ids=tokens[:, column : column + 1], **given).logits

    with winnow.compress(model, plan):
        cache = model(**inputs).past_key_values
        wanted = read(copy.deepcopy(cache), 0)
        read(cache, 1)
        cache.crop(-1)
        torch.testing.assert_close(read(cache, 0), wanted)
        with pytest.raises(WinnowError, match="cannot crop"):
            cache.crop(-6)


@pytest.mark.parametrize("plan", ["a-coarse-cache", "a-shared-cache"])
@pytest.mark.parametrize("lengths", [(19, 26, 11), (20, 20, 20)])
def test_beams_equal_each_sample_by_itself(plan: str, lengths: tuple[int, ...]) -> None:
    model, inputs = kvhand.text_model("llama", layers=4), kvhand.prompt(lengths)
    options = {"max_new_tokens": 9, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with winnow.compress(model, plan):
        got = model.generate(**inputs, **options)
        for row, n in enumerate(lengths):
            one = {k: v[row : row + 1, -n:] for k, v in inputs.items()}
            assert torch.equal(got[2 * row : 2 * row + 2, -9:], model.generate(**one, **options)[:, -9:])


@torch.no_grad()
def test_what_two_layers_share_is_held_once_also_after_samples_moved() -> None:
    model, inputs = kvhand.text_model("llama", layers=4), kvhand.prompt((20, 12))
    with winnow.compress(model, "minicache:gamma=0,start=2"):
        cache = model(**inputs).past_key_values
        lower, upper = (cache.layers[k].store.lots for k in (2, 3))
        for order in (None, [1, 0, 0]):
            if order is not None:
                cache.reorder_cache(torch.tensor(order))
                lower, upper = (cache.layers[k].store.lots for k in (2, 3))
            for a, b in zip(lower, upper, strict=True):
                shared = [getattr(block.keys, "shared", None) for lot in (a, b) for block in lot.blocks]
                assert isinstance(shared[0], Shared)
                assert shared[0] is shared[1]
                assert not shared[0].moved
        lots = [lot for k in (2, 3) for lot in cache.layers[k].store.lots]
        slots = 2 * (12 + 20 + 20)
        found = {x.data_ptr(): x.nbytes for lot in lots for block in lot.blocks for x in block.tensors()}
        assert sum(found.values()) == slots * 2 * 16 * 4 + 2 * slots * 2 * 4
        everything = {x.data_ptr(): x.untyped_storage().nbytes() for layer in cache.layers for x in layer.tensors()}
        assert held_bytes(cache) == sum(everything.values())


def test_what_does_not_go_together_is_refused() -> None:
    model, inputs = kvhand.text_model("llama", layers=4), kvhand.prompt((12,))
    for plan, why in (
        ("a-coarse-cache + a-shared-cache", "the same slots|another codec"),
        ("snapkv:keep=6,window=2 + a-shared-cache", "the same slots"),
        ("a-coarse-cache + snapkv:keep=6,window=2", "name it before"),
    ):
        with winnow.compress(model, plan), pytest.raises(WinnowError, match=why):
            model(**inputs)
    sliding = kvhand.text_model("gemma3")
    with winnow.compress(sliding, "minicache:start=1"), pytest.raises(WinnowError, match="attend to everything"):
        sliding(**inputs)


def test_a_codec_has_no_budget() -> None:
    assert not CoarseCache.takes_budgets()
    with pytest.raises(WinnowError, match="no setting `keep`"):
        CoarseCache().at_budget(16, 64)
