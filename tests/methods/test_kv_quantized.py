"""The plain quantised cache: groups as defined, bytes, the order of errors, and models by hand."""

from __future__ import annotations

import pytest
import torch

import winnow
from tests import kvhand
from tests.coded import check_against_changed, check_with_eviction, codecs_of
from winnow.contract import Codec, KVView, Observe, State
from winnow.core.errors import WinnowError
from winnow.methods.kv_quantized import KVQuantized


def data(b=2, g=2, n=40, d=16, seed=0, dtype=torch.float32):
    """Keys with two loud channels, as those of language models have; values without."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(b, g, n, d, generator=generator) for _ in range(2))
    keys[..., :2] = keys[..., :2] + 20
    return keys.to(dtype), values.to(dtype)


def coded(method, keys, values):
    codec, _ = method.evict(KVView.of(keys, values), State())
    assert isinstance(codec, Codec)
    return codec.encode(keys, values)


def _one(part, bits):
    low, step = part.min(), (part.max() - part.min()) / (2**bits - 1)
    return low + ((part - low) / step).round() * step


def _is_defined(encode):
    keys, values = data()
    for bits in (8, 4, 3, 2):
        for group in (8, 16, 0):
            k, v = keys.clone(), values.transpose(1, 2).flatten(2).clone()
            for i in range(2):
                for start in range(0, 40, group or 40):
                    for head in range(2):
                        for channel in range(16):
                            part = slice(start, start + (group or 40))
                            k[i, head, part, channel] = _one(k[i, head, part, channel], bits)
                for token in range(40):
                    for start in range(0, 32, group or 32):
                        part = slice(start, start + (group or 32))
                        v[i, token, part] = _one(v[i, token, part], bits)
            found = encode(KVQuantized(bits=bits, group=group), keys, values).read()
            torch.testing.assert_close(found[0], k, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[1], v.unflatten(2, (2, 16)).transpose(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.system("kv-quantized", "exact")
def test_equals_the_definition():
    _is_defined(coded)


def _by_token(method, keys, values):
    """Keys by token as well."""
    block = coded(method, values, keys)
    return type(block)(block.values, block.keys, block.length)


def _two_bits(method, keys, values):
    return coded(method.replace(bits=2), keys, values)


@pytest.mark.parametrize("stub", [_by_token, _two_bits])
def test_the_definition_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_defined(stub)


@pytest.mark.system("kv-quantized", "exact")
def test_sixteen_bits_change_nothing_and_fp8_is_a_cast():
    keys, values = data()
    assert isinstance(KVQuantized(bits=16).evict(KVView.of(keys, values), State())[0], Observe)
    found = coded(KVQuantized(bits="fp8"), keys, values).read()
    assert torch.equal(found[0], keys.to(torch.float8_e4m3fn).float())
    assert torch.equal(found[1], values.to(torch.float8_e4m3fn).float())


@pytest.mark.system("kv-quantized", "exact")
@pytest.mark.parametrize(("bits", "each"), [(8, 1), (4, 0.5), (3, 3 / 8), (2, 0.25), ("fp8", 1)])
def test_bytes(bits, each):
    keys, values = data(2, 4, 512, 64, dtype=torch.bfloat16)
    block = coded(KVQuantized(bits=bits), keys, values)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in block.tensors()}
    scales = 0 if bits == "fp8" else 2 * 2 * keys.numel() // 64 * 2
    assert sum(held.values()) == 2 * keys.numel() * each + scales


@pytest.mark.system("kv-quantized", "exact")
def test_a_sample_is_the_same_in_any_batch():
    keys, values = data(b=3, dtype=torch.bfloat16)
    whole, one = (coded(KVQuantized(), k, v).read() for k, v in ((keys, values), (keys[1:2], values[1:2])))
    for x, own in zip(whole, one, strict=True):
        assert x.dtype == torch.bfloat16
        assert torch.equal(x[1:2], own)


def _errors_fall(encode):
    keys, values = data(n=128)
    errors = []
    for bits in (2, 3, 4, 8):
        k, v = encode(KVQuantized(bits=bits, group=32), keys, values).read()
        errors.append((((k - keys).norm() / keys.norm()).item(), ((v - values).norm() / values.norm()).item()))
    for more, fewer in zip(errors[1:], errors, strict=False):
        assert more[0] < 0.7 * fewer[0]
        assert more[1] < 0.7 * fewer[1]
    # A channel that is loud throughout costs nothing by channel.
    assert errors[0][0] < 0.1


@pytest.mark.system("kv-quantized", "directional")
def test_errors_fall_with_bits_and_loud_channels_of_keys_cost_nothing():
    _errors_fall(coded)


@pytest.mark.parametrize("stub", [_by_token, _two_bits])
def test_the_direction_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _errors_fall(stub)


PLAN, METHOD = "kv-quantized:bits=3,group=4,every=8", KVQuantized(bits=3, group=4, every=8)


@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.system("kv-quantized", "model")
def test_a_padded_batch_equals_each_sample_by_hand(build):
    check_against_changed(build, PLAN, codecs_of(METHOD))


@pytest.mark.system("kv-quantized", "model", build="llama")
def test_after_an_eviction_the_kept_slots_are_quantised():
    check_with_eviction("snapkv:keep=50%,window=4", PLAN, codecs_of(METHOD))


def test_every_token_of_the_prompt_may_be_quantised_and_later_ones_stay():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((13, 19))
    with winnow.compress(model, "kv-quantized:every=0"):
        cache = kvhand.written(model, inputs, torch.full((2, 6), 5)).past_key_values
    assert [(lot.coded, lot.tail.length) for lot in cache.layers[0].store.lots] == [(13, 5), (19, 5)]


def test_bad_settings_are_refused():
    for settings in ({"bits": 5}, {"bits": "int4"}, {"group": -1}):
        with pytest.raises(WinnowError, match="allowed"):
            KVQuantized(**settings)
