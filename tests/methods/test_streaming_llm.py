"""StreamingLLM: sinks and the newest, sinks that follow the window, and what such a window cannot see."""

from __future__ import annotations

import pytest
import torch

import winnow
from tests import kvdecode, kvhand
from winnow.contract import Observe, State
from winnow.core.info import ModelInfo
from winnow.methods.snapkv import SnapKV
from winnow.methods.streaming_llm import StreamingLLM

from .kvchecks import (
    STUBS,
    KVView,
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


def _ends(layer, k):
    scores = torch.ones(2, 2, layer.n)
    scores[..., 4 : 4 + layer.n - k] = 0
    return scores


@pytest.mark.system("streaming-llm", "exact")
@pytest.mark.system("kvpress", "exact")
def test_keeps_what_kvpress_keeps():
    check_kept(lambda model, ids, k: kept_by(model, ids, f"streaming-llm:released,keep={k}"), _ends)


@pytest.mark.parametrize("stub", STUBS)
def test_a_stub_does_not(stub):
    with pytest.raises(AssertionError):
        check_kept(stub, _ends)


@pytest.mark.system("streaming-llm", "exact")
def test_promises():
    check_method(StreamingLLM(keep=9))
    assert chosen(StreamingLLM(keep=3), views()).tolist() == [[[0, 1, 2, 3]] * 2] * 2  # sinks win over the budget
    assert chosen(StreamingLLM(keep=3, n_sink=0), views()).tolist() == [[[37, 38, 39]] * 2] * 2


@pytest.mark.system("streaming-llm", "exact")
@pytest.mark.parametrize("every", [1, 4])
def test_a_limit_rolls_the_window(every):
    method = StreamingLLM(keep=12, limit=12, n_sink=3, every=every)
    left = list(range(3)) + list(range(21, 30))
    for view, slots in decoded(method, views(n=30), steps=17):
        left += [] if view.moment == "prefill" else [view.seen - 1]
        if len(left) == 12 + every:
            left = left[:3] + left[-9:]
        assert slots.tolist() == [[left] * 2] * 2


@torch.no_grad()
@pytest.mark.system("streaming-llm", "exact")
@pytest.mark.parametrize("every", [1, 3])
def test_sinks_follow_the_window(every):
    """Keys of the sinks are those of a model that reads them right before the window; the window stays as it is."""
    model, length = kvhand.text_model("llama", layers=2), 20
    tokens = kvhand.prompt((length + 9,), seed=2)["input_ids"]
    for rows in (1, 2):
        ids = tokens[:, :length].expand(rows, -1)
        (layer, *_) = layers_of(model, tokens)
        plain = rotated(layer.keys, -torch.arange(length + 9), layer.frequencies)
        with winnow.compress(model, f"streaming-llm:keep=10,limit=10,n_sink=3,every={every},shift=true"):
            cache = model(input_ids=ids, use_cache=True).past_key_values
            for seen in range(length, length + 9):
                held = cache.layers[0]
                slots = torch.cat([torch.arange(3), torch.arange(seen - held.store.length + 3, seen)])
                at = slots.clone()
                cut = held.store.slots[0, 0, 3]  # where the window began when the sinks came to it
                at[:3] = cut - 3 + torch.arange(3)
                wanted = rotated(plain[:, :, slots], at, layer.frequencies).expand(rows, -1, -1, -1)
                torch.testing.assert_close(held.store.read()[0], wanted, atol=2e-5, rtol=1e-5)
                assert held.store.length == 10 + (seen - length) % every
                model(input_ids=tokens[:, seen : seen + 1].expand(rows, -1), past_key_values=cache)


@torch.no_grad()
def test_sinks_that_follow_are_those_of_each_sample():
    own, tokens = kvdecode.case("llama", layers=2), kvdecode.words(8)
    own.check_batch("streaming-llm:keep=9,limit=9,shift=true", tokens)
    last = []
    for plan in ("keep=9,limit=9,shift=true", "keep=9,limit=9"):
        with winnow.compress(own.model, f"streaming-llm:{plan}"):
            last.append(kvhand.written(own.model, own.inputs, tokens).logits[-1])
    assert (last[0] - last[1]).abs().max() > 1e-3


@torch.no_grad()
def test_sinks_stay_where_nothing_is_dropped():
    model, inputs = kvhand.text_model("llama", layers=2), kvhand.prompt((12,))
    plain = model(**inputs).past_key_values
    for keep in ("100%", "12", "99"):
        with winnow.compress(model, f"streaming-llm:keep={keep},shift=true"):
            cache = model(**inputs).past_key_values
        assert torch.equal(cache.layers[1].store.read()[0], plain.layers[1].keys)
    view = views(n=30)
    action, state = StreamingLLM(keep="100%", shift=True).follow(view, State())
    assert isinstance(action, Observe)
    assert not state.token


def _error(view, index):
    """How far the newest queries read from what they read of all slots."""
    weights = view.attention(20).unflatten(1, (2, 2)).mean(2)
    whole = weights @ view.values
    at = index[:, :, None].expand(-1, -1, 20, -1)
    left = weights.gather(3, at)
    values = view.values.gather(2, index[..., None].expand(-1, -1, -1, 16))
    return (whole - (left / left.sum(-1, keepdim=True)) @ values).norm() / whole.norm()


@pytest.mark.system("streaming-llm", "directional")
def test_without_the_sinks_of_attention_a_window_reads_something_else():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, 1, 2, 150, 16, generator=generator)
        keys[:, :, :4] = 1.5 + keys[:, :, :4] / 10
        values[:, :, :4] /= 10  # sinks say little, and take most of the attention
        view = KVView.of(keys, values, 1 + torch.randn(1, 4, 150, 16, generator=generator))
        found = _error(view, chosen(StreamingLLM(keep=24), view))
        for stub in (torch.arange(126, 150), torch.arange(5, 149, 6)):
            assert found < 0.7 * _error(view, stub.expand(1, 2, 24))


@pytest.mark.system("snapkv", "directional")
def test_a_needle_in_the_middle_is_lost_and_snapkv_finds_it():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, 1, 2, 200, 16, generator=generator)
        queries = torch.randn(1, 4, 200, 16, generator=generator)
        needle = torch.randint(40, 120, (1,), generator=generator).item()
        question = torch.randn(1, 2, 1, 16, generator=generator)
        keys[:, :, needle : needle + 1] = 2 * question
        queries[:, :, -8:] += 2 * question.repeat_interleave(2, 1)
        view = KVView.of(keys, values, queries)
        found, ends = chosen(SnapKV(keep="20%", window=8), view), chosen(StreamingLLM(keep="20%"), view)
        assert found.shape == ends.shape == (1, 2, 40)
        assert all(needle in found[0, head] for head in range(2))
        assert not any(needle in ends[0, head] for head in range(2))
        blind = KVView.of(keys, values, queries.roll(100, 2))  # the question is not at the end
        assert not all(needle in chosen(SnapKV(keep=9, window=8), blind)[0, head] for head in range(2))


@pytest.mark.system("streaming-llm", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.parametrize("plan", ["keep=30%", "keep=9,limit=9"])
def test_on_models(build, plan):
    check_on_model(build, f"streaming-llm:{plan}")


def test_bad_settings():
    refused(lambda: StreamingLLM(limit=4), "limit=4 leaves no window")
    refused(lambda: StreamingLLM(shift=True, keep=("visual=10%",)), "no window")
    refused(lambda: StreamingLLM(shift=True).steps(ModelInfo(mrope=True)), "leave shift off")
    refused(lambda: StreamingLLM().shorten(views(), StreamingLLM(keep="mass=0.9").keep), "not negative")
