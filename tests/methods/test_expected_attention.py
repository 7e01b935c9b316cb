"""Expected Attention: kvpress's choice slot for slot, and slots that queries of the same kind do attend to later."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import winnow
from tests import kvhand, zoo
from tests.kvseen import projected, witnessed
from winnow.cache.rotary import Rotary
from winnow.methods.expected_attention import ExpectedAttention

from .kvchecks import (
    STUBS,
    KVView,
    Layer,
    check_kept,
    check_method,
    check_on_model,
    chosen,
    decoded,
    kept_by,
    layers_of,
    refused,
    rotated,
    views,
)

FREQUENCIES = 100.0 ** (-torch.arange(8) / 8)
ROTARY = Rotary(FREQUENCIES)


def _expected(layer, k, *, future=512, sinks=4, spread=True, values=True, epsilon=0.0, newest=None):
    """kvpress's, one query head after the other, from queries that never had a phase; `newest`: how many of them."""
    b, g, n, d = layer.keys.shape
    units = torch.eye(d)
    turns = [rotated(units, torch.full((d,), n + step), layer.frequencies).T for step in range(future)]
    turn = sum(turns) / future
    found = torch.zeros(b, g, n - sinks)
    for row in range(b):
        for head in range(2 * g):
            own = layer.origin[row, head, sinks if newest is None else -newest :]
            keys = layer.keys[row, head // 2, sinks:]
            mean = turn @ own.mean(0)
            logits = torch.stack([key @ mean for key in keys]) / d**0.5
            if spread:
                covariance = turn @ torch.cov(own.T, correction=0) @ turn.T
                logits = logits + torch.stack([key @ covariance @ key for key in keys]) / d / 2
            found[row, head // 2] += logits.softmax(0) / 2
    if values:
        found = (found + epsilon) * layer.values[:, :, sinks:].square().sum(-1).sqrt()
    return torch.cat([torch.full((b, g, sinks), torch.inf), found], 2)


@pytest.mark.system("expected-attention", "exact")
@pytest.mark.system("kvpress", "exact")
def test_keeps_what_kvpress_keeps():
    check_kept(lambda model, ids, k: kept_by(model, ids, f"expected-attention:released,keep={k}"), _expected)


@pytest.mark.parametrize("stub", STUBS)
def test_a_stub_does_not(stub):
    with pytest.raises(AssertionError):
        check_kept(stub, _expected)


def _seen(layer: Layer) -> KVView:
    return KVView.of(layer.keys, layer.values, layer.queries, rotary=Rotary(layer.frequencies))


@pytest.mark.system("expected-attention", "exact")
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"n_future_positions": 7}, {"future": 7}),
        ({"n_sink": 0}, {"sinks": 0}),
        ({"n_sink": 9}, {"sinks": 9}),
        ({"use_covariance": False}, {"spread": False}),
        ({"use_vnorm": False}, {"values": False}),
        ({"epsilon": 0.02}, {"epsilon": 0.02}),
    ],
)
def test_scores_equal_the_formula_at_all_settings(settings, options):
    ids = torch.stack([torch.randperm(118)[:31] + 2 for _ in range(2)])
    for layer in layers_of(kvhand.text_model("llama", layers=2), ids):
        layer = Layer(layer.origin / 4, layer.keys, layer.values, layer.frequencies)  # a softmax that is no one-hot
        found, wanted = ExpectedAttention(**settings).score(_seen(layer)), _expected(layer, 0, **options)
        s = options.get("sinks", 4)
        torch.testing.assert_close(found[..., s:], wanted[..., s:], atol=1e-5, rtol=1e-3)
        assert torch.equal(found[..., :s], found[..., s:].amax(-1, keepdim=True).expand(-1, -1, s))


@pytest.mark.system("expected-attention", "exact")
def test_only_distances_count():
    """A prompt that begins at another position, as in a row with padding, keeps the same."""
    layer = layers_of(kvhand.text_model("llama"), kvhand.prompt((40,))["input_ids"])[1]
    at = torch.arange(40) + 23
    view = KVView.of(
        rotated(layer.keys, torch.full((40,), 23), layer.frequencies),
        layer.values,
        rotated(layer.origin, at, layer.frequencies),
        rotary=Rotary(layer.frequencies),
        slots=at.expand(1, 2, 40),
        seen=63,
    )
    method = ExpectedAttention(keep=12)
    assert torch.equal(chosen(method, view), chosen(method, _seen(layer)))


@pytest.mark.system("expected-attention", "exact")
@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_behind_a_reduction_true_positions_count(build):
    """The formula on queries that never had a phase, and on keys as they stand before the newest token."""
    with witnessed() as views, winnow.compress(zoo.model(build), "divprune:keep=50% + a-witness-of-places") as handle:
        handle.model(**zoo.samples(build, ("3 A 6",))[0])
        seen = list(views)
    for view in seen:
        newest = view.positions()[:, :1, -1:].amax()
        frequencies = view.rotary.frequencies
        keys = rotated(view.keys, (view.n - 1 - newest).expand(view.n), frequencies)
        layer = Layer(projected(view, "q_proj").detach(), keys, view.values, frequencies)
        found, wanted = ExpectedAttention().score(view)[..., 4:].detach(), _expected(layer, 0)[..., 4:]
        counted = ExpectedAttention().score(replace(view, places=None, query_places=None))[..., 4:]
        assert (found - wanted).abs().max() < 1e-3 * (counted - wanted).abs().max()  # in slots it is another score
    assert len(seen) == zoo.DEPTH


@pytest.mark.system("expected-attention", "exact")
def test_promises():
    check_method(ExpectedAttention(keep=9), rotary=ROTARY)
    check_method(ExpectedAttention(keep=9, use_covariance=False, use_vnorm=False), rotary=ROTARY)
    found = chosen(ExpectedAttention(keep=9), views(rotary=ROTARY))
    assert (found[..., :4] == torch.arange(4)).all()


@pytest.mark.system("expected-attention", "exact")
def test_while_decoding_the_newest_queries_count():
    method = ExpectedAttention(keep=20, limit=20, every=4)
    cuts = 0
    for view, slots in decoded(method, views(n=50, rotary=ROTARY), steps=13):
        if view.moment == "decode" and view.n == 24:
            cuts += 1
            origin = rotated(view.queries, -torch.tensor([view.seen - 1]), FREQUENCIES)
            # As a prompt whose only queries are these: the formula counts later positions from their end.
            at = view.slots[0, 0]
            keys = rotated(view.keys, torch.full((24,), 24 - view.seen), FREQUENCIES)
            layer = Layer(origin.expand(-1, -1, 24, -1), keys, view.values, FREQUENCIES)
            wanted = _expected(layer, 20).topk(20).indices.sort(-1).values
            assert torch.equal(slots, view.slots.gather(2, wanted))
            assert at[0] == 0
    assert cuts == 3


@torch.no_grad()
@pytest.mark.system("expected-attention", "exact")
def test_while_decoding_128_queries_are_remembered():
    model, ids = kvhand.text_model("llama", layers=2), kvhand.prompt((145,), seed=8)["input_ids"]
    with winnow.compress(model, "expected-attention:keep=100%,limit=40,every=105"):
        cache = model(input_ids=ids[:, :142], use_cache=True).past_key_values
        for step in range(142, 145):
            assert cache.layers[0].store.length == step
            model(input_ids=ids[:, step : step + 1], past_key_values=cache)
    for layer, held in zip(layers_of(model, ids), cache.layers, strict=True):
        wanted = _expected(layer, 40, newest=128).topk(40).indices.sort(-1).values
        assert torch.equal(held.store.slots.long(), wanted)
        assert not torch.equal(wanted, _expected(layer, 40).topk(40).indices.sort(-1).values)


def _held(view, later, index):
    """The share of the attention of later queries that goes to what is kept, weighted with the values."""
    logits = later.unflatten(1, (2, 2)).flatten(2, 3) @ view.keys.transpose(2, 3) / 4
    mass = logits.softmax(-1).mean(2) * view.values.norm(dim=-1)
    return (mass.gather(2, index).sum(-1) / mass.sum(-1)).mean().item()


@pytest.mark.system("expected-attention", "directional")
def test_what_is_kept_is_what_later_queries_read():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        n, frequencies = 160, 10000.0 ** (-torch.arange(8) / 8)
        centre, width = torch.randn(2, 1, 4, 1, 16, generator=generator)
        drawn = centre + width * torch.randn(1, 4, 2 * n, 16, generator=generator)
        asked = rotated(drawn, torch.arange(2 * n), frequencies)
        origin, values = torch.randn(2, 1, 2, n, 16, generator=generator)
        keys = rotated(1.5 * origin, torch.arange(n), frequencies)
        view = KVView.of(keys, values, asked[:, :, :n], rotary=Rotary(frequencies))
        found = {
            name: _held(view, asked[:, :, n:], index)
            for name, index in {
                "expected": chosen(ExpectedAttention(keep=32, n_future_positions=n), view),
                "first": torch.arange(32).expand(1, 2, 32),
                "even": torch.arange(0, n, 5).expand(1, 2, 32),
                "newest": torch.arange(n - 32, n).expand(1, 2, 32),
            }.items()
        }
        assert found["expected"] > 1.4 * max(share for name, share in found.items() if name != "expected"), found


@pytest.mark.system("expected-attention", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.parametrize("plan", ["keep=30%", "keep=9,limit=9,every=3"])
def test_on_models(build, plan):
    check_on_model(build, f"expected-attention:{plan}")


def test_bad_settings():
    refused(lambda: ExpectedAttention(n_future_positions=0), "n_future_positions=0")
    refused(lambda: ExpectedAttention(epsilon=-1.0), "epsilon=-1.0")
    refused(lambda: ExpectedAttention().score(views()), "not rotary")
