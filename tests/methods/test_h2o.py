"""H2O: attention as it adds up, in the prompt and while decoding; heavy hitters and the newest stay."""

from __future__ import annotations

import pytest
import torch

from winnow.contract import Observe, State
from winnow.methods.h2o import H2O

from .kvchecks import STUBS, KVView, check_kept, check_method, check_on_model, chosen, decoded, kept_by, refused, views


def _observed(layer, k):
    """kvpress's: the mean over the queries that read a slot, then over the query heads of a KV head."""
    readers = torch.tensor([layer.n - j for j in range(layer.n)])
    return (layer.attention.sum(2) / readers).unflatten(1, (2, 2)).mean(2)


def _paper(layer, k):
    """The sum of attention; half of the budget is the newest slots."""
    scores = layer.attention.sum(2).unflatten(1, (2, 2)).sum(2)
    scores[..., layer.n - k // 2 :] = torch.inf
    return scores


@pytest.mark.system("h2o", "exact")
@pytest.mark.system("kvpress", "exact")
def test_keeps_what_kvpress_keeps():
    check_kept(lambda model, ids, k: kept_by(model, ids, f"h2o:released,keep={k}"), _observed)


@pytest.mark.system("h2o", "exact")
def test_keeps_heavy_hitters_and_the_newest():
    check_kept(lambda model, ids, k: kept_by(model, ids, f"h2o:keep={k}"), _paper)


@pytest.mark.parametrize("stub", STUBS)
@pytest.mark.parametrize("score", [_observed, _paper])
def test_a_stub_does_not(stub, score):
    with pytest.raises(AssertionError):
        check_kept(stub, score)


@pytest.mark.system("h2o", "exact")
def test_promises():
    check_method(H2O(keep=9, recent_share=0.0))
    check_method(H2O(keep=9, average="mean"))
    view = views(n=700, b=1)
    torch.testing.assert_close(H2O().score(view), view.per_kv_head(view.attention().sum(2)))  # in chunks of rows


@pytest.mark.system("h2o", "exact")
@pytest.mark.parametrize("average", ["sum", "mean"])
@pytest.mark.parametrize("every", [1, 3])
def test_attention_adds_up_while_decoding(average, every):
    """A dictionary for each head is all the naive version has: slot → [attention, queries]."""
    method = H2O(keep=10, limit=10, every=every, average=average)
    seen = [[{} for _ in range(2)] for _ in range(2)]
    evictions = 0
    for view, slots in decoded(method, views(n=24), steps=20):
        attention = view.attention()
        for row in range(2):
            for head in range(2):
                own = seen[row][head]
                names = view.slots[row, head].tolist()
                for i in range(attention.shape[2]):
                    for j, name in enumerate(names):
                        if view.moment == "prefill" and j > i:
                            continue
                        got = own.setdefault(name, [0.0, 0])
                        got[0] += attention[row, 2 * head : 2 * head + 2, i, j].mean().item()
                        got[1] += 1
                left = slots[row, head].tolist()
                if len(names) < (11 if view.moment == "prefill" else 10 + every):
                    assert left == names
                    continue
                evictions += 1
                worth = {name: own[name][0] / (own[name][1] if average == "mean" else 1) for name in names[:-5]}
                heavy = sorted(worth, key=worth.get, reverse=True)[:5]
                assert left == sorted(heavy + names[-5:])
                for name in set(names) - set(left):
                    del own[name]
    assert evictions == 4 * (1 + 20 // every)


@pytest.mark.system("h2o", "directional")
def test_heavy_hitters_are_found_and_stay_while_others_come_and_go():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(1, 2, 100, 16, generator=generator)
        asked = torch.randn(1, 4, 100, 16, generator=generator) + 2
        planted = [22, 41, 63]
        keys[:, :, planted] = 1.5 + keys[:, :, planted] / 10
        view = KVView.of(keys, keys, asked)
        found = chosen(H2O(keep=20), view)
        assert all(set(planted) <= set(found[0, head].tolist()) for head in range(2))
        assert all(set(range(90, 100)) <= set(found[0, head].tolist()) for head in range(2))
        for stub in (torch.arange(20), torch.arange(80, 100), torch.arange(0, 100, 5)):
            assert not set(planted) <= set(stub.tolist())
        last = [slots for _, slots in decoded(H2O(keep=20, limit=20), view, steps=15, seed=seed)][-1]
        assert all(set(planted) <= set(last[0, head].tolist()) for head in range(2))


@pytest.mark.system("h2o", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.parametrize("plan", ["keep=30%", "keep=9,limit=9"])
def test_on_models(build, plan):
    check_on_model(build, f"h2o:{plan}")


def test_nothing_is_remembered_where_nothing_will_be_dropped():
    action, state = H2O(keep="100%").evict(views(), State())
    assert isinstance(action, Observe)
    assert not state.token


def test_bad_settings():
    refused(lambda: H2O(recent_share=1.5), "recent_share=1.5")
    refused(lambda: H2O(average="median"), "sum, mean")
