"""Prefills in which some tokens alone attend, and samples that hold unequal numbers of slots."""

from typing import Any

import pytest
import torch

import winnow
from tests import kvhand, zoo
from winnow.cache.dense import Dense
from winnow.contract import (
    Attend,
    CacheMethod,
    KVBudget,
    KVStep,
    Observe,
    Point,
    Reduction,
    State,
    keep_slots,
    register,
)

STEPS = torch.randint(2, 120, (3, 6), generator=torch.Generator().manual_seed(5))


@register("a-sparse-prefill", stages=("cache",))
class SparsePrefill(CacheMethod):
    """Every second token attends, counted from the end, and in samples of even length the first four as well."""

    keep: KVBudget = KVBudget("50%")

    def evict(self, view: Any, state: State) -> Any:
        if "kept" in state.token:
            return keep_slots(Reduction.select(state.token["kept"])), State()
        if view.layer == 1 and view.n % 2:
            return Observe(), State()
        kept = torch.arange(view.n).flip(0) % 2 == 0
        kept[:4] |= view.n % 2 == 0
        if view.moment == "prefill":
            return keep_slots(Reduction.select(kept.expand(view.b, view.heads, -1))), State()
        mark = kept.expand(view.b, view.heads, -1).clone()
        return Attend(Reduction.select(kept.expand(view.b, -1))), State({"kept": mark})

    def steps(self, info: Any) -> tuple[KVStep, ...]:
        return tuple(KVStep(Point("kv", k), self.evict, when=("before", "prefill")) for k in range(info.depth))


@register("a-sample-each", stages=("cache",))
class SampleEach(CacheMethod):
    """Keeps the last slots: two more of each next sample of a view. It remembers which slot each was, plus one."""

    keep: KVBudget = KVBudget("50%")
    decodes = True

    def evict(self, view: Any, state: State) -> Any:
        if view.moment == "decode":
            mark = state.token["mark"]
            assert torch.equal(mark[mark > 0], view.slots[mark > 0] + 1)
            assert int((mark == 0).sum()) == view.b * view.heads * (view.seen - view.slots[mark > 0].max() - 1)
            return Observe(), state
        counts = torch.tensor([view.n // 2 + 2 * i for i in range(view.b)])
        kept = torch.arange(view.n).flip(0) < counts[:, None]
        lanes = kept[:, None].expand(-1, view.heads, -1)
        return keep_slots(Reduction.select(lanes)), State({"mark": view.slots + 1})


@pytest.mark.parametrize("build", ["llama", "gemma3", *zoo.BUILDS])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_tokens_that_do_not_attend_get_zeros_and_are_not_cached(build: str, kind: str) -> None:
    text = build in kvhand.TEXTS
    model: Any = kvhand.text_model(build) if text else zoo.model(build)
    inputs = kvhand.prompt((19, 26, 11)) if text else zoo.inputs(build, zoo.RAGGED)
    model.set_attn_implementation(kind)
    with winnow.compress(model, "a-sparse-prefill"):
        first = kvhand.written(model, inputs, STEPS[:, :1])
        got = kvhand.written(model, inputs, STEPS)
    evicted = kvhand.evicted_of(first.past_key_values)
    assert all(gone[..., -2].any() and not gone[..., -1].any() for gone in evicted.values())
    with kvhand.evicting(model, lambda layer, n: evicted.get(layer), sparse=True):
        wanted = kvhand.written(model, inputs, STEPS)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@torch.no_grad()
def test_a_second_prompt_on_a_cache_that_was_left_whole(kind: str) -> None:
    model: Any = kvhand.text_model("llama")
    model.set_attn_implementation(kind)
    ids = kvhand.prompt((21,))["input_ids"]
    cache = model(input_ids=ids[:, :15]).past_key_values
    with winnow.compress(model, "a-sparse-prefill"):
        got = model(input_ids=ids[:, 15:], past_key_values=cache)
    evicted = kvhand.evicted_of(got.past_key_values)
    with kvhand.evicting(model, lambda layer, n: evicted.get(layer) if n > 15 else None, sparse=True):
        full = model(input_ids=ids[:, :15]).past_key_values
        wanted = model(input_ids=ids[:, 15:], past_key_values=full).logits
    torch.testing.assert_close(got.logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(20, 20, 20), (19, 26, 19)])
def test_samples_of_unequal_numbers_lie_in_one_padded_cache(lengths: tuple[int, ...]) -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt(lengths)
    with winnow.compress(model, "a-sample-each"):
        first = kvhand.written(model, inputs, STEPS[:, :1])
        evicted = kvhand.evicted_of(first.past_key_values)
        got = kvhand.written(model, inputs, STEPS)
    store: Any = got.past_key_values.layers[0].store
    assert type(store) is Dense
    assert store.real is not None
    want = [n // 2 + 2 * i for n, i in zip(lengths, (0, 1, 2) if len(set(lengths)) == 1 else (0, 0, 1), strict=True)]
    assert store.real.sum(1).tolist() == [n + 5 for n in want]
    with kvhand.evicting(model, lambda layer, n: evicted.get(layer)):
        wanted = kvhand.written(model, inputs, STEPS)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
