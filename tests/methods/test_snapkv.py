"""SnapKV by its card: the window votes and stays, neighbours of a peak stay together, kvpress keeps the same slots."""

from __future__ import annotations

import pytest
import torch

from tests import kvdecode, kvhand
from tests import kvpress_byhand as kvpress
from winnow.contract import KVBudget, KVReduce, KVView, Reduction, State, WinnowError
from winnow.methods.snapkv import SnapKV

TOKENS = torch.randint(2, 120, (3, 9), generator=torch.Generator().manual_seed(4))


def kept(action, lane=(0, 0)) -> list[int]:
    """The slots that one head of one sample keeps."""
    return action.k.index[lane].tolist()


def view_of(queries, keys) -> KVView:
    """Of one sample, `[H, N, d]` and `[G, N, d]`."""
    return KVView.of(keys[None], keys[None], queries[None])


def newest(view: KVView, count: int) -> KVReduce:
    """A stub that looks at nothing."""
    index = torch.arange(view.n - count, view.n).expand(view.b, view.heads, count)
    return KVReduce(*[Reduction.select(index, view.n)] * 2)


def is_kvpress(shorten, n=150, window=64, kernel=5):
    for seed, ratio in enumerate((0.5, 0.45, 0.3)):
        queries, keys = kvpress.random_layer(seed, n)
        scores = kvpress.snapkv_scores(queries.double(), keys.double(), window, kernel)
        wanted = kvpress.best(scores, kvpress.kept_count(n, ratio))
        got = shorten(view_of(queries, keys), 1 - ratio)
        assert [kept(got, (0, g)) for g in range(2)] == wanted


@pytest.mark.system("snapkv", "exact")
def test_kvpress_keeps_the_same_slots():
    released = SnapKV.as_released()
    is_kvpress(lambda view, share: released.shorten(view, KVBudget(share)))
    small = released.replace(window=8, kernel=3)
    is_kvpress(lambda view, share: small.shorten(view, KVBudget(share)), n=40, window=8, kernel=3)


def test_kvpress_fails_for_a_stub():
    with pytest.raises(AssertionError):
        is_kvpress(lambda view, share: newest(view, int(view.n * share)))
    with pytest.raises(AssertionError):  # kernel 3 is not what it does
        is_kvpress(lambda view, share: SnapKV.as_released(kernel=3).shorten(view, KVBudget(share)))


@pytest.mark.system("snapkv", "exact")
@pytest.mark.parametrize("build", ["llama", "qwen3"])
def test_kvpress_keeps_the_same_slots_of_a_model(build):
    model, inputs = kvhand.text_model(build, layers=2), kvhand.prompt((90,))
    _, gone = kvdecode.Case(model, inputs).check_evictions("snapkv:released,keep=0.8", TOKENS[:1, :2])
    for layer, (queries, keys) in enumerate(kvdecode.heard(model, inputs)):
        scores = kvpress.snapkv_scores(queries[0].double(), keys[0].double())
        left = [(~own).nonzero()[:, 0].tolist() for own in gone[layer, 90][0]]
        assert left == kvpress.best(scores, kvpress.kept_count(90, 0.2))


@pytest.mark.system("snapkv", "exact")
def test_a_ratio_of_kvpress_is_its_complement_in_floats():
    view = view_of(*kvpress.random_layer(0, 200))
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        assert view.budget(KVBudget(1 - ratio)) == kvpress.kept_count(200, ratio)
    assert kvpress.kept_count(200, 0.8) == 39
    assert view.budget(KVBudget("20%")) == 40


@pytest.mark.system("snapkv", "exact")
def test_the_window_always_stays_and_a_large_budget_is_the_identity():
    queries, keys = kvpress.random_layer(3, 60)
    view = view_of(queries, keys)
    for count in (10, 25, 59):
        for g in range(2):
            own = kept(SnapKV(window=10).shorten(view, KVBudget(count)), (0, g))
            assert own[-10:] == list(range(50, 60))
            assert len(set(own)) == count
    for budget in (60, 61, "100%"):
        assert SnapKV().shorten(view, KVBudget(budget)) is None
    assert kept(SnapKV(window=32).shorten(view, KVBudget(7))) == list(range(28, 60))


@pytest.mark.system("snapkv", "exact")
def test_heads_that_change_places_take_their_slots_along():
    queries, keys = kvpress.random_layer(5, 80)
    there = SnapKV(window=8).shorten(view_of(queries, keys), KVBudget(20))
    back = SnapKV(window=8).shorten(view_of(queries.flip(0), keys.flip(0)), KVBudget(20))
    assert torch.equal(there.k.index, back.k.index.flip(1))


@pytest.mark.system("snapkv", "exact")
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pooling_keeps_neighbours_of_a_peak_together(pool):
    keys = torch.zeros(1, 64, 4)
    keys[0, 20, 0] = 60.0
    queries = torch.zeros(1, 64, 4)
    queries[0, -4:, 0] = 1.0
    view = view_of(queries, keys)
    assert set(kept(SnapKV(window=4, kernel=5, pool=pool).shorten(view, KVBudget(9)))[:5]) == {18, 19, 20, 21, 22}
    assert kept(SnapKV(window=4, kernel=1).shorten(view, KVBudget(9)))[:5] == [0, 1, 2, 3, 20]  # ties: the earlier


def test_broken_scores_are_kept_last_and_bf16_is_scored_in_fp32():
    queries, keys = kvpress.random_layer(6, 64)
    keys[:, 30] = torch.nan  # every row of attention is broken where it is read
    broken = SnapKV(window=4).shorten(view_of(queries, keys), KVBudget(20))
    assert kept(broken)[-4:] == [60, 61, 62, 63]
    view = KVView.of(*(x[None].bfloat16() for x in (keys.nan_to_num(), keys.nan_to_num(), queries)))
    assert SnapKV().score(view).dtype == torch.float32


def test_a_batch_is_its_samples():
    layers = [kvpress.random_layer(seed, 70) for seed in range(3)]
    queries, keys = (torch.stack(x) for x in zip(*layers, strict=True))
    whole = SnapKV(window=8).evict(KVView.of(keys, keys, queries), State())[0]
    for row, (q, k) in enumerate(layers):
        assert torch.equal(whole.k.index[row], SnapKV(window=8).evict(view_of(q, k), State())[0].k.index[0])


def memories(seed: int, n: int = 400, d: int = 64) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A head that follows repetitions: each key carries the token before it, each query asks for what came behind.

    The last 4 tokens repeat tokens of the middle. What stood behind those is what they need.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    tokens = torch.randperm(n, generator=generator)
    asked = torch.randperm(n - 200, generator=generator)[:4] + 100
    tokens[-4:] = tokens[asked]
    keys, queries = table[tokens.roll(1)], 12 * table[tokens]
    return queries[None] * d**0.5, keys[None], (asked + 1).tolist()


def recall(choose) -> float:
    found = []
    for seed in range(10):
        queries, keys, answers = memories(seed)
        own = set(choose(queries, keys))
        found += [answer in own for answer in answers]
    return sum(found) / len(found)


@pytest.mark.system("snapkv", "directional")
def test_a_tenth_of_the_cache_holds_what_the_end_of_the_prompt_asks_for():
    method, tenth = SnapKV(window=4), KVBudget("10%")

    def last(queries, keys):
        return kept(method.shorten(view_of(queries, keys), tenth))

    def first(queries, keys):  # the first queries vote in the place of the last
        other = torch.cat([queries[:, 4:], queries[:, :4]], 1)
        return kept(method.shorten(view_of(other, keys), tenth))

    assert recall(last) > 0.9
    assert recall(first) < 0.3
    assert recall(lambda queries, keys: range(360, 400)) < 0.3  # a stub


@pytest.mark.system("snapkv", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
def test_decoding_equals_the_full_cache_with_evicted_keys_masked(build):
    own = kvdecode.case(build)
    plan = "snapkv:keep=40%,window=3,limit=9,every=3"
    got, gone = own.check_evictions(plan, TOKENS)
    assert got.past_key_values.layers[0].store.length <= 9 + 3
    assert len({n for _, n in gone}) == 9
    own.check_batch(plan, TOKENS)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 0}, "window=0"),
        ({"kernel": 4}, "odd"),
        ({"pool": "sum"}, "mean, max"),
        ({"keep": "none"}, "keep"),
        ({"window": 8, "limit": 8}, "above 8"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, said):
    with pytest.raises(WinnowError, match=said):
        SnapKV(**settings)
