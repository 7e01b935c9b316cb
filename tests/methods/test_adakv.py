"""Ada-KV by its card: as many slots in all as the same number for each head, a floor, and never less of the score."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import winnow
from tests import kvdecode, kvhand
from tests import kvpress_byhand as kvpress
from winnow.cache.layer import held_bytes
from winnow.contract import CacheMethod, KVBudget, KVView, Observe, State, WinnowError, register
from winnow.methods.adakv import AdaKV
from winnow.methods.snapkv import SnapKV

ROOT = Path(__file__).resolve().parents[2]
LONGER = torch.randint(2, 120, (3, 9), generator=torch.Generator().manual_seed(4))
TOKENS = LONGER[:, :4]


@register("small-keys-first", stages=("cache",))
class SmallKeys(CacheMethod):
    """Scores by the norm of keys, which no other head's can be compared with."""

    keep: KVBudget = KVBudget("20%")

    def steps(self, info):
        return super().steps(info)[1:]  # the first layer is left alone

    def score(self, view: KVView) -> torch.Tensor:
        return -view.keys.float().norm(dim=-1)


@register("remembers", stages=("cache",))
class Remembers(SmallKeys):
    """The same, with a state of its own while decoding."""

    keep: KVBudget = KVBudget("20%")
    limit: int | None = None
    every: int = 1

    def evict(self, view, state):
        return super().evict(view, state)


def view_of(queries, keys, **known) -> KVView:
    return KVView.of(keys[None], keys[None], queries[None], **known)


def kept(action, row: int = 0) -> list[list[int]]:
    """The slots of each head of a sample."""
    own = action.k.lane(row)
    return [index[real].tolist() for index, real in zip(own.index, own.valid, strict=True)]


def is_kvpress(choose):
    for seed, ratio in enumerate((0.5, 0.3, 0.45)):
        queries, keys = kvpress.random_layer(seed, 150)
        scores = kvpress.snapkv_scores(queries.double(), keys.double(), 24)
        assert choose(view_of(queries, keys), 1 - ratio) == kvpress.adakv_kept(scores, ratio)


@pytest.mark.system("adakv", "exact")
def test_kvpress_keeps_the_same_slots():
    base = "[snapkv:released,window=24]"
    is_kvpress(lambda view, share: kept(AdaKV.as_released(keep=share, base=base[1:-1]).evict(view, State())[0]))
    plan = winnow.Plan.parse(f"adakv:released,base={base}")
    assert plan.methods[0].scorer == SnapKV.as_released(window=24)
    assert winnow.Plan.parse(plan.key) == plan


def test_kvpress_fails_for_a_stub():
    with pytest.raises(AssertionError):  # as many in each head
        is_kvpress(lambda view, share: kept(SnapKV(window=24, keep=share).evict(view, State())[0]))
    with pytest.raises(AssertionError):  # all for the floor
        is_kvpress(
            lambda view, share: kept(AdaKV(base="snapkv:window=24", keep=share, floor=1).evict(view, State())[0])
        )


@pytest.mark.system("adakv", "exact")
@pytest.mark.parametrize("base", ["snapkv:window=6", "snapkv:window=6,kernel=1", "tova", "small-keys-first", "h2o"])
def test_in_all_as_much_as_equal_heads_with_a_floor_and_never_less_of_the_score(base):
    for seed, floor in enumerate((0, 0.2, 0.5, 1)):
        queries, keys = kvpress.random_layer(seed, 100, heads=8, groups=4)
        view = view_of(queries, keys)
        method = AdaKV(base=base, keep=25, floor=floor)
        score, (_, last) = method.score(view)[0], method.scorer.ends(view)
        own = kept(method.evict(view, State())[0])
        alone = kept(method.scorer.evict(view, State())[0])
        assert sum(map(len, own)) == 4 * 25
        assert all(len(head) >= int(floor * 25) and set(range(100 - last, 100)) <= set(head) for head in own)
        gained = [float(score[g, own[g]].sum() - score[g, alone[g]].sum()) for g in range(4)]
        assert sum(gained) >= -1e-6
        if floor == 1:
            assert own == alone


@pytest.mark.system("adakv", "exact")
def test_equal_heads_keep_what_each_would_keep_alone():
    queries, keys = kvpress.random_layer(7, 90)
    same = view_of(queries[:1].expand(4, -1, -1), keys[:1].expand(2, -1, -1))
    for budget in (15, "31%"):
        alone = SnapKV(window=6, keep=budget).evict(same, State())[0]
        assert kept(AdaKV(base="snapkv:window=6", keep=budget).evict(same, State())[0]) == kept(alone)
    flat = view_of(torch.zeros(2, 40, 4), torch.randn(2, 40, 4))  # and so do equal scores
    assert kept(AdaKV(base="tova", keep=7).evict(flat, State())[0]) == [list(range(7))] * 2


@pytest.mark.system("adakv", "exact")
def test_norms_are_made_comparable_between_heads():
    queries, keys = kvpress.random_layer(3, 60)
    for scaled in (keys, keys * torch.tensor([1.0, 50.0])[:, None, None]):
        view = view_of(queries, scaled)
        got = kept(AdaKV(base="small-keys-first", keep=20).evict(view, State())[0])
        raw = kept(AdaKV(base="small-keys-first", keep=20, scale="never").evict(view, State())[0])
        if scaled is keys:
            wanted = got
    assert got == wanted  # the scale of a head says nothing
    assert len(raw[1]) == 4  # without it the head with large keys has its floor alone
    attended = AdaKV(keep=20, base="snapkv:window=4")
    assert torch.equal(attended.score(view), SnapKV(window=4).score(view))


@pytest.mark.system("adakv", "exact")
def test_kinds_and_mass_are_budgets_too():
    queries, keys = kvpress.random_layer(4, 60)
    kinds = torch.zeros(1, 2, 60, dtype=torch.int64)
    kinds[..., 10:50] = 1
    action = AdaKV(base="snapkv:window=4", keep=("visual=25%", "text=100%")).evict(
        view_of(queries, keys, kinds=kinds), State()
    )[0]
    own = kept(action)
    assert sum(10 <= i < 50 for head in own for i in head) == 20
    assert all({*range(10), *range(50, 60)} <= set(head) for head in own)
    assert len(own[0]) != len(own[1])
    view = view_of(queries, keys)
    mass = KVBudget("mass=0.8")
    alone = SnapKV(window=4).shorten(view, mass)
    assert sum(map(len, kept(AdaKV(base="snapkv:window=4", keep=mass).evict(view, State())[0]))) == 2 * alone.k.m


def test_what_merges_or_weighs_is_no_base():
    view = view_of(*kvpress.random_layer(5, 60))
    with pytest.raises(WinnowError, match="does more than keep"):
        AdaKV(base="ems", keep=20).evict(view, State())


def test_broken_scores_come_last_and_a_full_budget_changes_nothing():
    queries, keys = kvpress.random_layer(5, 40)
    keys[0, 3] = torch.nan
    view = view_of(queries, keys)
    own = kept(AdaKV(base="small-keys-first", keep=39, floor=0).evict(view, State())[0])
    assert 3 not in own[0]
    for budget in (40, "100%"):
        assert isinstance(AdaKV(keep=budget).evict(view, State())[0], Observe)


def test_a_batch_is_its_samples():
    layers = [kvpress.random_layer(seed, 50) for seed in range(3)]
    queries, keys = (torch.stack(x) for x in zip(*layers, strict=True))
    whole = AdaKV(base="snapkv:window=4").evict(KVView.of(keys, keys, queries), State())[0]
    for row, (q, k) in enumerate(layers):
        assert kept(whole, row) == kept(AdaKV(base="snapkv:window=4").evict(view_of(q, k), State())[0])


def error_of(method, seeds: int = 12) -> float:
    """How far what the newest tokens read moves when the rest is dropped: one head looks at few slots, one at many."""
    total = 0.0
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(2, 200, 16, generator=generator) for _ in range(3))
        queries = torch.tensor([4.0, 0.7])[:, None, None] * (torch.randn(2, 1, 16, generator=generator) + 0.3 * q)
        view = KVView.of(k[None], v[None], queries[None])
        action = method.evict(view, State())[0]
        weights = view.attention(8)
        stays = torch.zeros(2, 200)
        for head, own in enumerate(kept(action)):
            stays[head, own] = 1
        left = weights * stays[None, :, None]
        moved = left / left.sum(-1, keepdim=True) @ view.values - weights @ view.values
        total += float(moved.abs().sum(-1).mean())
    return total / seeds


@pytest.mark.system("adakv", "directional")
def test_heads_that_look_at_few_slots_lend_theirs_to_those_that_look_at_many():
    base = "snapkv:window=8,kernel=1"
    equal = SnapKV(window=8, kernel=1, keep=40)
    mine = AdaKV(base=base, keep=40)
    assert error_of(mine) < 0.9 * error_of(equal)
    with pytest.raises(AssertionError):  # a stub: the floor is everything
        assert error_of(mine.replace(floor=1)) < 0.9 * error_of(equal)


@pytest.mark.system("adakv", "model")
@pytest.mark.parametrize("build", ["llama", "qwen3", "llava_clip", "qwen2_5_vl"])
def test_decoding_equals_the_full_cache_with_evicted_keys_masked(build):
    own = kvdecode.case(build)
    plan = "adakv:base=snapkv:window=3,keep=40%"
    got, _ = own.check_evictions(plan, TOKENS)
    assert any(len(set(layer.store.lengths)) > 3 for layer in got.past_key_values.layers)
    own.check_batch(plan, TOKENS)


def test_a_limit_bounds_each_head_by_itself():
    own = kvdecode.case("llama")
    plan = "adakv:base=snapkv:window=2,keep=40%,limit=6,every=2"
    got, gone = own.check_evictions(plan, LONGER)
    read = max(n for _, n in gone)
    for layer in got.past_key_values.layers:
        assert max(layer.store.lengths) <= 6 + 2
        for lane in range(6):
            assert layer.store.lane(lane)[2][-2:].tolist() == [read - 2, read - 1]
    own.check_batch(plan, LONGER)


@torch.no_grad()
def test_a_later_turn_keeps_heads_of_unequal_length():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((40,))
    ids = inputs["input_ids"]
    with winnow.compress(model, "adakv:base=snapkv:window=3,keep=40%"):
        cache = model(input_ids=ids[:, :25]).past_key_values
        first = kvhand.evicted_of(cache)
        got = [model(input_ids=ids[:, 25:39], past_key_values=cache).logits]
        second = kvhand.evicted_of(cache)
        lengths = [sum(layer.store.lengths) for layer in cache.layers]
        got.append(model(input_ids=ids[:, 39:], past_key_values=cache).logits)
    assert lengths == [2 * (10 + 5)] * 3
    with kvhand.evicting(model, lambda layer, n: {39: first, 40: second}.get(n, {}).get(layer)):
        cache = model(input_ids=ids[:, :25]).past_key_values
        wanted = [model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in ((25, 39), (39, 40))]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "base"), [("llama", "pyramidkv:window=2"), ("llama", "kvpress"), ("qwen2_5_vl", "small-keys-first")]
)
def test_any_base_that_ranks(build, base):
    own = kvdecode.case(build)
    _, gone = own.check_evictions(f"adakv:base={base},keep=40%", TOKENS[:, :3])
    assert min(layer for layer, _ in gone) == (1 if base == "small-keys-first" else 0)


def test_a_fifth_of_the_slots_is_a_fifth_of_the_bytes():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((2000,))
    with torch.no_grad(), winnow.compress(model, "adakv:keep=20%") as handle:
        cache = model(**inputs).past_key_values
        ledger = handle.last
    lengths = [layer.store.lengths for layer in cache.layers]
    assert all(sum(own) == 2 * 400 for own in lengths)
    assert any(own[0] != own[1] for own in lengths)
    assert ledger.kv_bytes == held_bytes(cache) <= 0.25 * ledger.kv_bytes_full


MEASURED = """
import gc, torch, winnow
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, pad_token_id=0)).eval()
ids = torch.randint(1, 64, (1, 2048))

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

@torch.no_grad()
def held(plan):
    with winnow.compress(model, plan):
        before = resident()
        cache = model(ids, logits_to_keep=1).past_key_values
        return resident() - before

print(*(min(held(plan) for _ in range(2)) for plan in ("adakv:keep=20%", "full")))  # a first run loads more
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
def test_a_fifth_of_the_slots_is_a_fifth_of_the_memory_of_the_process():
    # Fixed thresholds: freed memory goes back at once, so that what is resident is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    )
    mine, full = map(int, done.stdout.split())
    assert full >= 0.95 * 4 * 2048 * 8 * 64 * 2 * 4
    assert mine <= 0.25 * full


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base": "divprune"}, "does not keep slots by a score"),
        ({"base": "adakv"}, "does not keep slots by a score"),
        ({"base": "small-keys-first", "limit": 20}, "leave limit unset"),
        ({"base": "remembers", "limit": 20}, "leave limit unset"),
        ({"base": "snapkv:window=4", "limit": 4}, "above 4"),
        ({"base": "snapk"}, "snapkv"),
        ({"base": "snapkv:width=3"}, "no setting"),
        ({"floor": 1.5}, "floor"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, said):
    with pytest.raises(WinnowError, match=said):
        AdaKV(**settings)
