"""Compressed caches: eviction equals the full cache with evicted keys masked; full budgets change no bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer, QuantoQuantizedLayer

import winnow
from tests import kvdecode, kvhand, zoo
from winnow.cache.layer import HeldLayer, held_bytes
from winnow.contract import CacheMethod, KVBudget, KVView, register
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.reduction import Reduction
from winnow.core.step import KVReduce

STEPS = torch.randint(2, 120, (3, 6), generator=torch.Generator().manual_seed(5))
TEXTS = tuple(kvhand.TEXTS)


@register("a-ragged-cache", stages=("cache",))
class RaggedCache(CacheMethod):
    """Keeps more in the first head than in the others."""

    keep: KVBudget = KVBudget("50%")
    limit: int | None = None
    every: int = 3

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        n = view.budget(keep)
        if n >= view.n:
            return None
        counts = [min(view.n, n + 2), max(1, n - 2)] * view.b
        order = view.keys.norm(dim=-1).sort(-1).indices
        index = torch.zeros(view.b, 2, max(counts), dtype=torch.int64)
        for lane, count in enumerate(counts):
            row, head = divmod(lane, 2)
            index[row, head, :count] = order[row, head, :count].sort().values
        chosen = Reduction.select(index, view.n, counts=counts)
        return KVReduce(chosen, chosen)


def model_and_inputs(build: str, ragged: bool = True) -> tuple[Any, dict[str, Tensor]]:
    if build in kvhand.TEXTS:
        return kvhand.text_model(build), kvhand.prompt(kvdecode.LENGTHS if ragged else (21, 21, 21))
    return zoo.model(build), zoo.inputs(build, zoo.RAGGED if ragged else ("3 A 6",) * 3)


@pytest.mark.parametrize("build", [*TEXTS, *zoo.BUILDS])
@pytest.mark.parametrize("ragged", [False, True])
def test_eviction_equals_the_full_cache_with_evicted_keys_masked(build: str, ragged: bool) -> None:
    model, inputs = model_and_inputs(build, ragged)
    kvdecode.Case(model, inputs).check_evictions("snapkv:keep=30%,window=4", STEPS)


@pytest.mark.parametrize("name", kvhand.OTHERS)
def test_s4_classes_that_attend_in_other_ways(name: str) -> None:
    case = kvdecode.Case(kvhand.other_model(name), kvhand.prompt(kvdecode.LENGTHS))
    case.check_evictions("snapkv:keep=30%,window=4", STEPS)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpt2", "no `layers`"), ("mistral", "has none"), ("minimax", "a cache of another kind")],
)
def test_s4_classes_that_cannot_are_refused_when_attached(name: str, said: str) -> None:
    model = kvhand.other_model(name)
    with pytest.raises(UnsupportedError, match=said):
        winnow.compress(model, "snapkv:keep=30%,window=4")


def test_s4_caches_that_cannot_hold_it_are_refused() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((12,))
    quantized = DynamicCache()
    quantized.layers = [QuantizedLayer.__new__(QuantoQuantizedLayer) for _ in range(3)]
    for layer in quantized.layers:
        layer.is_initialized, layer.cumulative_length = False, 0
    with winnow.compress(model, "snapkv:keep=6,window=2"):
        with pytest.raises(UnsupportedError, match="QuantoQuantizedLayer"):
            model(**inputs, past_key_values=quantized)
        with pytest.raises(UnsupportedError, match="static cache"):
            model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=64))


@pytest.mark.parametrize("build", ["llama", "qwen3", "llava_clip", "qwen2_5_vl"])
@pytest.mark.parametrize("ragged", [False, True])
def test_heads_may_hold_unequal_numbers_of_slots(build: str, ragged: bool) -> None:
    model, inputs = model_and_inputs(build, ragged)
    got, _ = kvdecode.Case(model, inputs).check_evictions("a-ragged-cache:keep=30%", STEPS)
    lengths = got.past_key_values.layers[0].store.lengths
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("build", [*TEXTS, "llava_next", "qwen2_5_vl"])
def test_a_full_budget_changes_no_bit(build: str) -> None:
    model, inputs = model_and_inputs(build)
    plain = kvhand.written(model, inputs, STEPS)
    with winnow.compress(model, "snapkv:keep=100%"):
        got = kvhand.written(model, inputs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))
    after = kvhand.written(model, inputs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, plain.logits, strict=True))


@pytest.mark.parametrize("build", ["llama", "gemma3", "llava_clip", "qwen2_5_vl"])
def test_a_batch_equals_its_samples(build: str) -> None:
    kvdecode.case(build).check_batch("snapkv:keep=40%,window=4", STEPS)


@pytest.mark.parametrize("build", ["llava_clip", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("kv", ["snapkv:keep=40%,window=4", "a-ragged-cache:keep=40%"])
def test_connector_decoder_and_cache_in_one_plan(build: str, kv: str) -> None:
    """Eviction on top of reductions equals those reductions with the evicted keys of each layer masked."""
    model, inputs = model_and_inputs(build)
    image = "divprune:keep=50% + fastv:layer=2,keep=25%"
    with winnow.compress(model, f"{image} + {kv}") as handle:
        first = kvhand.written(model, inputs, STEPS[:, :1])
        evicted = kvhand.evicted_of(first.past_key_values)
        got = kvhand.written(model, inputs, STEPS)
        ledger = handle.last
    assert ledger is not None
    with winnow.compress(model, image), kvhand.evicting(model, lambda layer, n: evicted.get(layer)):
        wanted = kvhand.written(model, inputs, STEPS)
    assert len(evicted) == zoo.DEPTH
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert ledger.kv_bytes < ledger.kv_bytes_full
    assert ledger.layer_tokens[3] < ledger.layer_tokens[0]


@pytest.mark.parametrize("ragged", [False, True])
def test_a_method_may_follow_another_in_one_prefill(ragged: bool) -> None:
    """The second one sees the queries of what the first has left, also where that is less than was read."""
    model, inputs = model_and_inputs("llama", ragged)
    got, _ = kvdecode.Case(model, inputs).check_evictions("snapkv:keep=60%,window=4 + snapkv:keep=5,window=4", STEPS)
    real = got.past_key_values.layers[0].store.slots.shape[2]
    assert real == 5


def test_budgets_by_kind_keep_all_text() -> None:
    model, inputs = model_and_inputs("llava_next")
    with winnow.compress(model, "snapkv:keep=[visual=25%,text=100%],window=2") as handle:
        got = kvhand.written(model, inputs, STEPS[:, :1])
        ledger = handle.last
    pictures = (inputs["input_ids"] == zoo.IMAGE).sum(1).tolist()
    texts = (inputs["attention_mask"].sum(1) - torch.tensor(pictures)).tolist()
    wanted = sum(2 * (n // 4 + text) for n, text in zip(pictures, texts, strict=True))
    assert ledger.kv_slots == (wanted,) * zoo.DEPTH
    gone = kvhand.evicted_of(got.past_key_values)[0]
    is_text = inputs["input_ids"] != zoo.IMAGE
    assert not (gone[:, 0, : is_text.shape[1]] & is_text & inputs["attention_mask"].bool()).any()


@torch.no_grad()
def test_kinds_are_taken_back_with_what_is_cropped() -> None:
    model, (inputs,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    plan = "snapkv:keep=[visual=25%,text=100%],window=2"
    later = {k: v for k, v in zoo.samples("llava_clip", ("2 B 4",))[0].items() if k != "attention_mask"}
    with winnow.compress(model, plan):
        cache = model(**inputs, use_cache=True).past_key_values
        straight = copy.deepcopy(cache)
        for token in (7, 8, 9):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        cache.crop(-3)
        first, second = (model(**later, past_key_values=held, use_cache=True) for held in (cache, straight))
    torch.testing.assert_close(first.logits, second.logits)
    for a, b in zip(cache.layers, straight.layers, strict=True):
        assert torch.equal(a.kinds, b.kinds)


def test_bytes_are_those_of_the_storages() -> None:
    model = kvhand.text_model("llama")
    inputs = kvhand.prompt((400, 400))
    with winnow.compress(model, "snapkv:keep=20%") as handle:
        cache = model(**inputs).past_key_values
        ledger = handle.last
    held = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for layer in cache.layers for x in layer.tensors()
    }
    assert ledger.kv_bytes == sum(held.values()) == held_bytes(cache)
    slots = 2 * 2 * 80
    assert ledger.kv_slots == (slots,) * 3
    assert ledger.kv_bytes == 3 * slots * (2 * 16 * 4 + 4)
    assert ledger.kv_bytes_full == 3 * 2 * 2 * 400 * 2 * 16 * 4


def test_a_budget_in_bytes_is_kept() -> None:
    model = kvhand.text_model("llama")
    with winnow.compress(model, "snapkv:keep=100KB") as handle:
        model(**kvhand.prompt((400, 400)))
        keys = sum(n * 2 * 16 * 4 for n in handle.last.kv_slots)
    assert 0.95 * 100_000 < keys <= 100_000


def test_a_limit_bounds_what_a_head_holds_while_decoding() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((24, 24, 24))
    tokens = torch.randint(2, 120, (3, 20), generator=torch.Generator().manual_seed(1))
    with winnow.compress(model, "snapkv:window=4,keep=16,limit=16,every=4"):
        out = kvhand.written(model, inputs, tokens)
    layer = out.past_key_values.layers[1]
    assert layer.seen == 24 + 19
    assert layer.store.length <= 16 + 4


@torch.no_grad()
def test_a_later_turn_goes_on_with_what_is_left() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((30,))
    with winnow.compress(model, "snapkv:keep=12,window=4"):
        cache = model(**inputs).past_key_values
        evicted = kvhand.evicted_of(cache)
        second = kvhand.prompt((5,), seed=3)["input_ids"]
        got = model(input_ids=second, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    with kvhand.evicting(model, lambda layer, n: evicted.get(layer)):
        full = model(**inputs).past_key_values
        wanted = model(input_ids=second, past_key_values=full, use_cache=True).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_crop_takes_back_what_came_after_the_cut_and_refuses_more() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((30,))
    tokens = kvhand.prompt((4,), seed=3)["input_ids"]
    with winnow.compress(model, "snapkv:keep=12,window=4"):
        cache = model(**inputs).past_key_values
        wanted = model(input_ids=tokens[:, :1], past_key_values=copy.deepcopy(cache)).logits
        for step in range(4):
            model(input_ids=tokens[:, step : step + 1], past_key_values=cache)
        cache.crop(-4)
        assert cache.get_seq_length() == 30
        got = model(input_ids=tokens[:, :1], past_key_values=cache).logits
        torch.testing.assert_close(got, wanted)
        with pytest.raises(WinnowError, match="cannot crop 5 tokens"):
            cache.crop(-5)


@pytest.mark.parametrize("plan", ["snapkv:keep=40%,window=4", "a-ragged-cache:keep=40%"])
def test_beams_and_several_answers_equal_those_with_evicted_keys_masked(plan: str) -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt(kvdecode.LENGTHS)
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with winnow.compress(model, plan):
        evicted = kvhand.evicted_of(kvhand.written(model, inputs, STEPS[:, :1]).past_key_values)
        got = model.generate(**inputs, **options)
    wide = {layer: gone.repeat_interleave(3, 0) for layer, gone in evicted.items()}
    with kvhand.evicting(model, lambda layer, n: wide.get(layer)):
        wanted = model.generate(**inputs, **options)
    assert torch.equal(got, wanted)


def test_what_cannot_be_compressed_is_refused() -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((12,))
    with winnow.compress(model, "snapkv:keep=6,window=2") as handle:
        with pytest.raises(WinnowError, match="use_cache"):
            model(**inputs, use_cache=False)
        with pytest.raises(WinnowError, match="static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        cache = model(**inputs).past_key_values
        assert all(isinstance(layer, HeldLayer) for layer in cache.layers)
        with handle.using("full"):
            model(**inputs, use_cache=False)
    with pytest.raises(WinnowError, match="no longer"):
        model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    with pytest.raises(WinnowError, match="is a language model"):
        winnow.compress(model, "divprune:keep=8")


def test_only_layers_that_attend_to_everything_are_compressed() -> None:
    model, inputs = kvhand.text_model("gemma3"), kvhand.prompt((24,))
    with winnow.compress(model, "snapkv:keep=6,window=2") as handle:
        model(**inputs)
        slots = handle.last.kv_slots
    assert slots == (12, None, 12)


@pytest.mark.parametrize(("keep", "kept"), [(3, 8), (8, 8), (11, 11), (24, 24), (500, 24)])
def test_b5_a_window_wins_over_a_smaller_budget_and_a_larger_one_drops_nothing(keep: int, kept: int) -> None:
    model = kvhand.text_model("llama")
    with winnow.compress(model, f"snapkv:keep={keep},window=8") as handle:
        cache = model(**kvhand.prompt((24,))).past_key_values
        assert handle.last.kv_slots == (2 * kept,) * 3
    slots = cache.layers[0].store.slots
    if slots is not None:
        assert slots[0, 0, -8:].tolist() == list(range(16, 24))
