"""MiniCache by its card: directions, lengths and the tokens that stay; pairs; bytes; models by hand."""

from __future__ import annotations

import math

import pytest
import torch

import winnow
from tests import kvhand
from tests.coded import check_against_changed, codecs_of
from winnow.contract import Codec, KVView, ModelInfo, Observe, State
from winnow.core.errors import WinnowError
from winnow.methods.minicache import MiniCache


def data(b=2, g=2, n=30, d=16, seed=0, apart=0.3, dtype=torch.float32):
    """Keys and values of two layers that point nearly the same way, and differ in length; a few tokens differ."""
    generator = torch.Generator().manual_seed(seed)

    def pair():
        x = torch.randn(b, g, n, d, generator=generator)
        y = x + apart * torch.randn(b, g, n, d, generator=generator)
        y[:, :, 5] = torch.randn(b, g, d, generator=generator)
        return x.to(dtype), (y * (0.5 + 2 * torch.rand(b, g, n, 1, generator=generator))).to(dtype)

    (below_k, k), (below_v, v) = pair(), pair()
    return below_k, below_v, k, v


def coded(method, *tensors):
    codec, _ = method.evict(KVView.of(*tensors[2:]), State())
    assert isinstance(codec, Codec)
    assert codec.pair
    return codec.encode(*tensors)


def read(method, *tensors, make=coded):
    """The four tensors as they are read back."""
    return [x for block in make(method, *tensors) for x in block.read()]


def _naive(x, y, t, gamma):
    """Vectors `[n, w]` of one unit, token by token."""
    angles, found = [], []
    for u, v in zip(x.double(), y.double(), strict=True):
        a, b = u.norm(), v.norm()
        angle = math.acos(max(-1.0, min(1.0, float(u @ v / (a * b)))))
        if math.sin(angle) < 1e-6:
            e = (1 - t) * u / a + t * v / b
            e = e / e.norm()
        else:
            e = (math.sin((1 - t) * angle) * u / a + math.sin(t * angle) * v / b) / math.sin(angle)
        angles.append(angle / math.pi)
        found.append((a * e, b * e))
    bound = max(angles) - gamma * (max(angles) - min(angles))
    stay = [d > bound for d in angles]
    lower = torch.stack([x[i] if s else found[i][0].float() for i, s in enumerate(stay)])
    upper = torch.stack([y[i] if s else found[i][1].float() for i, s in enumerate(stay)])
    return lower, upper


def _is_the_paper(make):
    tensors = data()
    for settings in ({}, {"t": 0.3, "gamma": 0.4}, {"gamma": 0.0}, {"unit": "token", "gamma": 0.2}):
        method = MiniCache(**settings)
        found = read(method, *tensors, make=make)
        for lower, upper in ((0, 2), (1, 3)):
            x, y, own = tensors[lower], tensors[upper], (found[lower], found[upper])
            for i in range(2):
                if method.unit == "token":
                    flat = [z[i].transpose(0, 1).flatten(1) for z in (x, y)]
                    wanted = [z.unflatten(1, (2, 16)).transpose(0, 1) for z in _naive(*flat, method.t, method.gamma)]
                    for a, b in zip(own, wanted, strict=True):
                        torch.testing.assert_close(a[i], b, atol=1e-5, rtol=1e-5)
                    continue
                for h in range(2):
                    for a, b in zip(own, _naive(x[i, h], y[i, h], method.t, method.gamma), strict=True):
                        torch.testing.assert_close(a[i, h], b, atol=1e-5, rtol=1e-5)


@pytest.mark.system("minicache", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(coded)


class Mean:
    """The two layers averaged, as the paper's baseline does."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def read(self):
        return self.tensors


def averaged(method, below_k, below_v, k, v):
    block = Mean((below_k + k) / 2, (below_v + v) / 2)
    return block, block


def without_retention(method, *tensors):
    return coded(method.replace(gamma=0.0), *tensors)


def of_the_least_apart(method, *tensors):
    """Keeps the tokens that are alike: the paper's inequality read the other way round."""
    blocks = coded(method, *tensors)
    for block in blocks:
        for half in (block.keys, block.values):
            if half.kept is not None:
                half.kept.copy_(half.restored()[:, :, : half.kept.shape[2]])
    return blocks


@pytest.mark.parametrize("stub", [averaged, without_retention, of_the_least_apart])
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(stub)


@pytest.mark.system("minicache", "exact")
def test_all_tokens_kept_change_nothing():
    tensors = data()
    assert isinstance(MiniCache(gamma=1).evict(KVView.of(*tensors[2:]), State())[0], Observe)
    model, inputs = kvhand.text_model("llama", layers=4), kvhand.prompt((9, 14))
    tokens = torch.full((2, 4), 7)
    plain = kvhand.written(model, inputs, tokens).logits
    with winnow.compress(model, "minicache:gamma=1"):
        got = kvhand.written(model, inputs, tokens).logits
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.system("minicache", "exact")
@pytest.mark.parametrize(("t", "which"), [(0.0, (0, 1)), (1.0, (2, 3))])
def test_at_either_end_one_layer_is_restored(t, which):
    tensors = data()
    found = read(MiniCache(t=t, gamma=0), *tensors)
    for i in which:
        torch.testing.assert_close(found[i], tensors[i], atol=1e-5, rtol=1e-5)


@pytest.mark.system("minicache", "exact")
def test_merging_and_rotation_commute():
    tensors = data(d=2)
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    turned = read(MiniCache(), *(x @ turn.T for x in tensors))
    for a, b in zip(turned, read(MiniCache(), *tensors), strict=True):
        torch.testing.assert_close(a, b @ turn.T, atol=1e-5, rtol=1e-5)


@pytest.mark.system("minicache", "exact")
@pytest.mark.parametrize("unit", ["head", "token"])
@pytest.mark.parametrize("bits", [16, 4])
def test_bytes_of_a_pair(unit, bits):
    b, g, n, d = 2, 4, 256, 64
    tensors = data(b, g, n, d, dtype=torch.bfloat16)
    blocks = coded(MiniCache(unit=unit, gamma=0.0, bits=bits), *tensors)
    held = {x.data_ptr(): x.untyped_storage().nbytes() for block in blocks for x in block.tensors()}
    units, width = (g, d) if unit == "head" else (1, g * d)
    direction = n * g * d * bits / 8 + (2 * 2 * n * units if bits < 16 else 0)
    assert sum(held.values()) == 2 * b * (direction + 2 * n * units * 2)
    if bits == 16:
        full = sum(x.nbytes for x in tensors)
        assert sum(held.values()) / full == 0.5 + 1 / width
    kept = coded(MiniCache(unit=unit, gamma=0.2, bits=bits), *tensors)
    more = {x.data_ptr(): x.untyped_storage().nbytes() for block in kept for x in block.tensors()}
    extra = sum(half.kept.nbytes for block in kept for half in (block.keys, block.values))
    index = sum(half.shared.at.nbytes for half in (kept[0].keys, kept[0].values))
    assert sum(more.values()) == sum(held.values()) + extra + index


@pytest.mark.system("minicache", "exact")
def test_half_precision_and_a_sample_is_the_same_in_any_batch():
    tensors = data(b=3, dtype=torch.bfloat16)
    whole = read(MiniCache(gamma=0.3), *tensors)
    one = read(MiniCache(gamma=0.3), *(x[1:2] for x in tensors))
    for x, own in zip(whole, one, strict=True):
        assert x.dtype == torch.bfloat16
        assert torch.equal(x[1:2], own)


def test_zeros_and_opposites_stay_finite():
    below_k, below_v, k, v = data()
    k[:, :, 3], below_k[:, :, 4], v[:, :, 6] = 0, 0, -below_v[:, :, 6]
    found = read(MiniCache(gamma=0), below_k, below_v, k, v)
    assert all(x.isfinite().all() for x in found)
    torch.testing.assert_close(found[0][:, :, 3], below_k[:, :, 3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2][:, :, 4], k[:, :, 4], atol=1e-5, rtol=1e-5)


def _is_nearer_than_the_mean(make):
    tensors = data(n=200)
    found, mean = read(MiniCache(gamma=0), *tensors, make=make), read(MiniCache(), *tensors, make=averaged)
    for own, other, x in zip(found, mean, tensors, strict=True):
        assert (own - x).norm() < 0.8 * (other - x).norm()
    kept = read(MiniCache(gamma=0.3), *tensors, make=make)
    for own, other, x in zip(kept, found, tensors, strict=True):
        assert (own - x).norm() < (other - x).norm()


@pytest.mark.system("minicache", "directional")
def test_is_nearer_than_the_mean_of_two_layers_and_nearer_still_with_retention():
    _is_nearer_than_the_mean(coded)


@pytest.mark.parametrize("stub", [averaged, without_retention])
def test_the_direction_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_nearer_than_the_mean(stub)


@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.system("minicache", "model")
def test_a_padded_batch_equals_each_sample_by_hand(build):
    check_against_changed(build, "minicache:every=3,gamma=0.2", codecs_of(MiniCache(every=3, gamma=0.2)))


@pytest.mark.system("minicache", "model", build="llama")
def test_each_token_is_merged_at_once_where_that_is_asked():
    check_against_changed("llama", "minicache:every=1,unit=token", codecs_of(MiniCache(every=1, unit="token")))


def test_pairs_begin_at_half_of_the_depth_and_not_below_a_quarter():
    def uppers(depth, **settings):
        return [step.at.index for step in MiniCache(**settings).steps(ModelInfo(depth=depth))]

    assert uppers(8) == [5, 7]
    assert uppers(9) == [5, 7]
    assert uppers(8, start=2) == [3, 5, 7]
    for depth, start in ((8, 1), (8, 7), (1, None)):
        with pytest.raises(WinnowError, match="pairs begin in layers"):
            uppers(depth, start=start)
    for settings in ({"t": 2}, {"gamma": -1}, {"unit": "layer"}, {"bits": 5}):
        with pytest.raises(WinnowError, match="allowed"):
            MiniCache(**settings)
