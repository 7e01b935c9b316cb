"""PyramidKV by its card: as much in all as SnapKV, more below than above, and SnapKV's choice within a layer."""

from __future__ import annotations

import pytest
import torch

from tests import kvdecode, kvhand
from tests import kvpress_byhand as kvpress
from winnow.contract import KVView, Observe, State, WinnowError
from winnow.methods.pyramidkv import PyramidKV
from winnow.methods.snapkv import SnapKV

TOKENS = torch.randint(2, 120, (3, 8), generator=torch.Generator().manual_seed(4))


def views(queries, keys, depth) -> list[KVView]:
    """The same keys in each layer of a model."""
    return [KVView.of(keys[None], keys[None], queries[None], layer=i, depth=depth) for i in range(depth)]


def counts(method, layers) -> list[int]:
    answers = [method.evict(view, State())[0] for view in layers]
    return [view.n if isinstance(a, Observe) else a.k.m for a, view in zip(answers, layers, strict=True)]


def is_kvpress(
    evict, cases=((400, 0.6, 64, 20), (400, 0.5, 64, 20), (400, 0.5, 8, 20), (300, 0.3, 8, 20), (300, 0.6, 8, 4))
):
    for seed, (n, ratio, window, beta) in enumerate(cases):
        queries, keys = kvpress.random_layer(seed, n, heads=2)
        scores = kvpress.snapkv_scores(queries.double(), keys.double(), window)
        for layer, view in enumerate(views(queries, keys, 4)):
            wanted = kvpress.best(scores, kvpress.pyramid_count(n, ratio, layer, 4, window, beta))
            chosen = evict(view, {"keep": 1 - ratio, "window": window, "beta": beta})
            assert chosen == wanted


def released(view, settings):
    index = PyramidKV.as_released(**settings).evict(view, State())[0].k.index[0]
    return [own.tolist() for own in index]


@pytest.mark.system("pyramidkv", "exact")
def test_kvpress_keeps_the_same_slots():
    is_kvpress(released)


def test_kvpress_fails_for_a_stub():
    def flat(view, settings):
        settings = {"keep": settings["keep"], "window": settings["window"]}
        return [own.tolist() for own in SnapKV(**settings).evict(view, State())[0].k.index[0]]

    with pytest.raises(AssertionError):
        is_kvpress(flat)
    with pytest.raises(AssertionError):  # a pyramid where kvpress has none
        is_kvpress(lambda view, settings: released(view, settings | {"narrow": "clamp"}))


@pytest.mark.system("pyramidkv", "exact")
def test_layers_hold_as_much_as_equal_ones_and_less_higher_up():
    queries, keys = kvpress.random_layer(0, 300)
    found = counts(PyramidKV(keep="20%"), views(queries, keys, 6))
    assert abs(sum(found) - 6 * 60) <= 6
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (112, 8)  # 60/20 is below the window of 8


@pytest.mark.system("pyramidkv", "exact")
@pytest.mark.parametrize("budget", [12, 64, 150, "20%", "90%"])
def test_beta_one_is_snapkv(budget):
    queries, keys = kvpress.random_layer(1, 200)
    for view in views(queries, keys, 5):
        mine = PyramidKV(keep=budget, beta=1).evict(view, State())[0]
        snap = SnapKV(keep=budget, window=8).evict(view, State())[0]
        assert torch.equal(mine.k.index, snap.k.index)


@pytest.mark.system("pyramidkv", "exact")
def test_budgets_in_bytes_are_those_of_the_whole_cache_and_a_full_budget_changes_nothing():
    queries, keys = kvpress.random_layer(2, 256)
    layers = views(queries, keys, 4)
    slot = layers[0].slot_bytes
    assert abs(sum(counts(PyramidKV(keep=f"{4 * 60 * slot}B"), layers)) - 240) <= 4
    assert counts(PyramidKV(keep="100%"), layers) == [256] * 4
    assert counts(PyramidKV(keep=300), layers) == [256] * 4


def test_a_later_turn_shares_out_what_it_added():
    queries, keys = kvpress.random_layer(3, 190)
    held = (90, 50, 20)
    found = []
    for layer, n in enumerate(held):
        view = KVView.of(
            keys[None, :, : n + 100], keys[None, :, : n + 100], queries[None, :, :100], layer=layer, depth=3, fresh=100
        )
        found.append(PyramidKV(keep="30%").evict(view, State())[0].k.m)
    assert [m - n for m, n in zip(found, held, strict=True)] == [52, 30, 8]


def funnel(seed: int, n: int = 240, depth: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of layers that attend to ever fewer slots."""
    layers = []
    for layer in range(depth):
        generator = torch.Generator().manual_seed(seed * 10 + layer)
        q, k = (torch.randn(2, n, 16, generator=generator) for _ in range(2))
        shared = torch.randn(2, 1, 16, generator=generator)  # the newest tokens ask for much the same
        layers.append((0.4 * 2**layer * (shared + 0.2 * q), k))
    return layers


def mass_kept(method, flipped=False) -> float:
    """The attention of the window that the kept slots hold, over all layers and heads."""
    total = 0.0
    for seed in range(4):
        layers = funnel(seed)
        for layer, (queries, keys) in enumerate(reversed(layers) if flipped else layers):
            view = KVView.of(keys[None], keys[None], queries[None], layer=layer, depth=4)
            index = method.evict(view, State())[0].k.index
            total += float(view.mass(4).gather(2, index).sum() / 4)
    return total / (4 * 4 * 2)


@pytest.mark.system("pyramidkv", "directional")
def test_where_attention_narrows_with_depth_a_pyramid_holds_more_of_it():
    mine = PyramidKV(keep=64, window=4, kernel=1, beta=2)
    equal = mine.replace(beta=1)
    assert mass_kept(mine) > mass_kept(equal) + 0.015
    assert mass_kept(mine, flipped=True) < mass_kept(equal, flipped=True) - 0.015  # and less where it widens


@pytest.mark.system("pyramidkv", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
def test_decoding_equals_the_full_cache_with_evicted_keys_masked(build):
    own = kvdecode.case(build)
    plan = "pyramidkv:keep=50%,window=2,beta=4,limit=8,every=2"
    got, _ = own.check_evictions(plan, TOKENS)
    lengths = [layer.store.length for layer in got.past_key_values.layers]
    assert lengths[0] > lengths[-1]
    assert sum(lengths) <= len(lengths) * (8 + 2)
    own.check_batch(plan, TOKENS)


def test_without_a_limit_what_is_decoded_stays():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((40,))
    got, _ = kvdecode.Case(model, inputs).check_evictions("pyramidkv:keep=50%,window=2", TOKENS[:1, :4])
    assert [layer.store.length for layer in got.past_key_values.layers] == [41, 23, 5]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.5}, "beta"),
        ({"keep": (5, 6)}, "count"),
        ({"keep": "mass=0.9"}, "count"),
        ({"keep": ("visual=10%",)}, "count"),
        ({"kernel": 2}, "odd"),
        ({"limit": 3}, "above 8"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, said):
    with pytest.raises(WinnowError, match=said):
        PyramidKV(**settings)
