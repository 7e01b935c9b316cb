"""TOVA: the newest query decides for all heads of a layer, and at every decoded token where there is a limit."""

from __future__ import annotations

import pytest
import torch

from tests import kvdecode, kvhand
from tests import kvpress_byhand as kvpress
from winnow.contract import KVBudget, KVView, Observe, State, WinnowError
from winnow.methods.tova import TOVA

TOKENS = torch.randint(2, 120, (3, 8), generator=torch.Generator().manual_seed(4))


def view_of(queries, keys, **known) -> KVView:
    return KVView.of(keys[None], keys[None], queries[None], **known)


def kept(method, view) -> list[list[int]]:
    return [own.tolist() for own in method.evict(view, State())[0].k.index[0]]


def is_kvpress(choose):
    for seed, ratio in enumerate((0.5, 0.8, 0.3)):
        queries, keys = kvpress.random_layer(seed, 120)
        scores = kvpress.tova_scores(queries.double(), keys.double())
        assert choose(view_of(queries, keys), 1 - ratio) == kvpress.best(scores, kvpress.kept_count(120, ratio))


@pytest.mark.system("tova", "exact")
def test_kvpress_keeps_the_same_slots():
    is_kvpress(lambda view, share: kept(TOVA.as_released(keep=share), view))


def test_kvpress_fails_for_a_stub():
    with pytest.raises(AssertionError):
        is_kvpress(lambda view, share: [list(range(view.n - int(view.n * share), view.n))] * 2)
    with pytest.raises(AssertionError):  # each KV head by itself
        is_kvpress(lambda view, share: each_head(view, int(view.n * share)))


def each_head(view: KVView, count: int) -> list[list[int]]:
    scores = view.per_kv_head(view.attention(1))[0, :, 0]
    return [sorted(own.topk(count).indices.tolist()) for own in scores]


@pytest.mark.system("tova", "exact")
@pytest.mark.parametrize("build", ["llama", "qwen3"])
def test_kvpress_keeps_the_same_slots_of_a_model(build):
    model, inputs = kvhand.text_model(build, layers=2), kvhand.prompt((60,))
    _, gone = kvdecode.Case(model, inputs).check_evictions("tova:released,keep=30%", TOKENS[:1, :2])
    for layer, (queries, keys) in enumerate(kvdecode.heard(model, inputs)):
        scores = kvpress.tova_scores(queries[0].double(), keys[0].double())
        left = [(~own).nonzero()[:, 0].tolist() for own in gone[layer, 60][0]]
        assert left == kvpress.best(scores, 18)


@pytest.mark.system("tova", "exact")
def test_the_newest_token_is_one_like_the_others_unless_it_is_said():
    keys = torch.zeros(1, 20, 4)
    keys[0, :, 0] = torch.arange(20, 0, -1.0)
    queries = torch.ones(1, 20, 4)
    view = view_of(queries, keys)
    assert kept(TOVA(keep=5), view) == [[0, 1, 2, 3, 4]]
    assert kept(TOVA(keep=5, keep_newest=True), view) == [[0, 1, 2, 3, 19]]


@pytest.mark.system("tova", "exact")
def test_equal_scores_keep_the_earlier_and_broken_ones_come_last():
    flat = view_of(torch.zeros(2, 12, 4), torch.randn(1, 12, 4))
    assert kept(TOVA(keep=4), flat) == [[0, 1, 2, 3]]
    broken = torch.randn(1, 12, 4)
    broken[0, 3] = torch.nan
    assert kept(TOVA(keep=4, keep_newest=True), view_of(torch.ones(2, 12, 4), broken)) == [[0, 1, 2, 11]]
    wide = view_of(*(x.bfloat16() for x in kvpress.random_layer(0, 30)))
    assert TOVA().score(wide).dtype == torch.float32


@pytest.mark.system("tova", "exact")
def test_a_full_state_loses_one_slot_for_each_decoded_token():
    queries, keys = kvpress.random_layer(2, 41)
    method = TOVA(keep=40, limit=40)
    full = method.evict(view_of(queries[:, -1:], keys[:, :40], moment="decode", fresh=1), State())[0]
    assert isinstance(full, Observe)
    (first, second) = kept(method, view_of(queries[:, -1:], keys, moment="decode", fresh=1))
    assert first == second
    row = [sum(kvpress.attended(queries, keys, h, 1)[i] for h in range(4)) for i in range(41)]
    assert set(range(41)) - set(first) == {row.index(min(row))}


def test_a_batch_is_its_samples():
    layers = [kvpress.random_layer(seed, 50) for seed in range(3)]
    queries, keys = (torch.stack(x) for x in zip(*layers, strict=True))
    whole = TOVA().evict(KVView.of(keys, keys, queries), State())[0].k.index
    for row, (q, k) in enumerate(layers):
        assert whole[row].tolist() == kept(TOVA(), view_of(q, k))


def stream(policy, steps: int = 60, limit: int = 16, d: int = 32) -> float:
    """How often a slot that every later query asks for is still there at the end of a long decoding."""
    held = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        asked = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        keys = torch.randn(1, limit, d, generator=generator)
        keys[0, 5] = 6 * asked
        names = list(range(limit))
        for step in range(steps):
            query = (3 * asked * d**0.5 + torch.randn(d, generator=generator))[None, None].expand(2, 1, d)
            keys = torch.cat([keys, torch.randn(1, 1, d, generator=generator)], 1)
            names.append(limit + step)
            own = policy(view_of(query, keys, moment="decode", fresh=1), limit)
            keys, names = keys[:, own], [names[i] for i in own]
        held += 5 in names
    return held / 12


@pytest.mark.system("tova", "directional")
def test_what_is_asked_for_again_and_again_outlives_a_long_decoding():
    assert stream(lambda view, limit: kept(TOVA(limit=limit), view)[0]) == 1
    assert stream(lambda view, limit: range(view.n - limit, view.n)) == 0  # a stub: the newest


@pytest.mark.system("tova", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
def test_decoding_equals_the_full_cache_with_evicted_keys_masked(build):
    own = kvdecode.case(build)
    plan = "tova:keep=8,limit=8"
    got, _ = own.check_evictions(plan, TOKENS)
    assert {layer.store.length for layer in got.past_key_values.layers} == {8}
    own.check_batch(plan, TOKENS)


def test_several_tokens_may_come_between_two_evictions():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((20,))
    got, _ = kvdecode.Case(model, inputs).check_evictions("tova:keep=25%,limit=6,every=4", TOKENS[:1])
    assert {layer.store.length for layer in got.past_key_values.layers} == {8}  # 5, … 9, 6 at the tenth, 7, 8


@pytest.mark.parametrize(
    ("settings", "said"), [({"limit": 0}, "limit"), ({"keep": 0}, "keep"), ({"every": 0.5}, "every")]
)
def test_settings_that_say_nothing_are_refused(settings, said):
    with pytest.raises(WinnowError, match=said):
        TOVA(**settings)


def test_mass_is_a_budget():
    queries, keys = kvpress.random_layer(1, 80)
    view = view_of(queries, keys)
    own = kept(TOVA(keep="mass=0.9"), view)[0]
    row = view.attention(1).mean(1)[0, 0]
    assert float(row[own].sum()) >= 0.9 > float(row[own].sum() - row[own].min())
    assert TOVA(keep="mass=0.9").keep == KVBudget("mass=0.9")
