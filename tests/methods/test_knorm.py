"""L2 norm of keys: kvpress's choice slot for slot, and slots that get attention where short keys do."""

from __future__ import annotations

import pytest
import torch

from winnow.core.info import ModelInfo
from winnow.methods.knorm import KNorm

from .kvchecks import STUBS, KVView, check_kept, check_method, check_on_model, chosen, decoded, kept_by, refused, views


def _norms(layer, k):
    return -(layer.keys**2).sum(-1).sqrt()


@pytest.mark.system("knorm", "exact")
@pytest.mark.system("kvpress", "exact")
def test_keeps_what_kvpress_keeps():
    check_kept(lambda model, ids, k: kept_by(model, ids, f"knorm:released,keep={k}"), _norms)


@pytest.mark.parametrize("stub", STUBS)
def test_a_stub_does_not(stub):
    with pytest.raises(AssertionError):
        check_kept(stub, _norms)


@pytest.mark.system("knorm", "exact")
def test_promises():
    check_method(KNorm(keep=9))
    equal = torch.ones(1, 2, 30, 4)
    assert chosen(KNorm(keep=4), KVView.of(equal, equal)).tolist() == [[[0, 1, 2, 3]] * 2]


@pytest.mark.system("knorm", "exact")
def test_a_limit_drops_the_longest_keys():
    method = KNorm(keep="100%", limit=12, every=3)
    for view, slots in decoded(method, views(n=10), steps=14):
        if view.moment == "decode" and view.n == 15:
            short = view.keys.norm(dim=-1).argsort(-1)[..., :12].sort(-1).values
            assert torch.equal(slots, view.slots.gather(2, short))
        else:
            assert slots.shape[2] == view.n < 15


def test_layers_at_the_beginning_may_stay_whole():
    steps = KNorm(skip=2).steps(ModelInfo(depth=5))
    assert [step.at.index for step in steps] == [2, 3, 4]
    assert KNorm(skip=9).steps(ModelInfo(depth=5)) == ()


def _attended(choose, seed):
    """Attention that is kept of queries that lie opposite to long keys, as in the paper's models."""
    generator = torch.Generator().manual_seed(seed)
    away = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    keys = torch.randn(1, 2, 200, 16, generator=generator) / 2
    along = torch.rand(1, 2, 200, 1, generator=generator) * 12
    keys = keys + along * away
    queries = torch.randn(1, 4, 200, 16, generator=generator) - 3 * away
    view = KVView.of(keys, keys, queries)
    mass = view.per_kv_head(view.attention(20).mean(2))
    return mass.gather(2, choose(view)).sum(-1).mean().item()


@pytest.mark.system("knorm", "directional")
def test_short_keys_hold_the_attention():
    def longest(view):
        return view.keys.norm(dim=-1).topk(20).indices

    even = torch.arange(0, 200, 10).expand(1, 2, 20)
    for seed in range(5):
        found = _attended(lambda view: chosen(KNorm(keep=20), view), seed)
        assert found > 0.4
        for stub in (lambda view: even, lambda view: torch.arange(20).expand(1, 2, 20), longest):
            assert _attended(stub, seed) < found / 2


@pytest.mark.system("knorm", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.parametrize("plan", ["keep=30%", "keep=9,limit=9,every=2"])
def test_on_models(build, plan):
    check_on_model(build, f"knorm:{plan}")


def test_bad_settings():
    refused(lambda: KNorm(skip=-1), "knorm: skip=-1")
    refused(lambda: KNorm(keep="mass=0.9").shorten(views(), KNorm(keep="mass=0.9").keep), "not negative")
