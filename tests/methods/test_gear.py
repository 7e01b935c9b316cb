"""GEAR by its card: integers, outliers and a low-rank part as defined; bytes; the order of errors; models by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import winnow
from tests import kvhand
from tests.coded import check_against_changed, check_with_eviction, codecs_of
from winnow.contract import Codec, KVView, Observe, State
from winnow.core.errors import WinnowError
from winnow.methods.gear import Gear


def data(b=1, g=2, n=96, d=16, seed=0, dtype=torch.float32):
    """Rank four, and a heavy tail."""
    generator = torch.Generator().manual_seed(seed)

    def one():
        low = torch.randn(b, g, n, 4, generator=generator) @ torch.randn(b, g, 4, d, generator=generator)
        tail = torch.randn(b, g, n, d, generator=generator) / torch.rand(b, g, n, d, generator=generator).add(0.05)
        return (low + 0.5 * tail).to(dtype)

    return one(), one()


def coded(method, keys, values, which="encode"):
    codec, _ = method.evict(KVView.of(keys, values), State())
    assert isinstance(codec, Codec)
    return getattr(codec, which)(keys, values)


def _naive_lines(lines: Tensor, bits: int, group: int, each: int, short: int) -> Tensor:
    """Each line by itself: outliers out, quantised group by group, outliers back in."""
    found = lines.clone()
    for line in found:
        whole, n = line.clone(), len(line)
        order = whole.argsort()
        out = set(order[:each].tolist()) | set(order[n - each :].tolist()) | set(range(n - short, n))
        rest = torch.tensor([whole.mean() if i in out else whole[i] for i in range(n)])
        for start in range(0, n, group or n):
            part = rest[start : start + (group or n)]
            low, step = part.min(), (part.max() - part.min()) / (2**bits - 1)
            line[start : start + (group or n)] = low + ((part - low) / step).round() * step
        for i in out:
            line[i] = whole[i]
    return found


def naive(keys: Tensor, values: Tensor, method: Gear, rank: int) -> list[Tensor]:
    generator, found = torch.Generator().manual_seed(0), []
    for x, along in ((keys, "tokens"), (values, "channels")):
        b, g, n, d = x.shape
        length = n if along == "tokens" else g * d
        each = int((g * d if method.counted == "width" else length) * method.sparsity / 2)
        short = n % method.group if method.counted == "width" and along == "tokens" and method.group else 0
        start = torch.rand(g, d, rank, generator=generator)
        torch.rand(g, n, rank, generator=generator)
        made = torch.empty_like(x)
        for i in range(b):
            if along == "tokens":
                for h in range(g):
                    made[i, h] = _naive_lines(x[i, h].T, method.bits, method.group, min(each, n // 2), short).T
            else:
                lines = _naive_lines(x[i].transpose(0, 1).reshape(n, -1), method.bits, method.group, each, 0)
                made[i] = lines.reshape(n, g, d).transpose(0, 1)
            for h in range(g if rank else 0):
                rest, p = x[i, h] - made[i, h], start[h]
                for loop in range(method.loops):
                    p = torch.linalg.qr(p).Q if loop == method.loops - 1 else p
                    a = rest @ p
                    a = torch.linalg.qr(a).Q if loop == method.loops - 1 else a
                    p = rest.T @ a
                made[i, h] += a @ p.T
        found.append(made)
    return found


SETTINGS = (
    {"group": 16, "sparsity": 0.1},
    {"group": 16, "sparsity": 0.0, "bits": 4},
    {"group": 0, "sparsity": 0.1, "bits": 4},
    {"group": 16, "sparsity": 0.2, "rank": 0, "bits": 3},
    {"group": 16, "sparsity": 0.1, "counted": "width"},
    {"group": 20, "sparsity": 0.1, "counted": "width"},
)


def _is_the_paper(encode):
    keys, values = data(b=2, n=48)
    for settings in SETTINGS:
        method = Gear(**settings)
        for which, rank in (("encode", method.rank), ("later", method.later_rank if method.rank else 2)):
            found = encode(method, keys, values, which).read()
            for a, b in zip(found, naive(keys, values, method, rank), strict=True):
                torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.system("gear", "exact")
def test_equals_the_paper_written_naively():
    _is_the_paper(coded)


def _integers(method, keys, values, which):
    return coded(method.replace(sparsity=0.0, rank=0, later_rank=0), keys, values, which)


def _exchanged(method, keys, values, which):
    return coded(method, values, keys, which)


@pytest.mark.parametrize("stub", [_integers, _exchanged])
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(stub)


@pytest.mark.system("gear", "exact")
def test_outliers_of_keys_are_counted_by_tokens_and_in_the_released_code_by_width():
    keys, values = data(n=200, g=2, d=16)
    own, released = (coded(method, keys, values) for method in (Gear(), Gear.as_released()))
    assert own.keys.base.form.value.shape[2] == 2 * int(200 * 0.02 / 2)
    assert not hasattr(released.keys.base.form, "value")  # 32 · 0.02 / 2 is less than one
    wide = coded(Gear.as_released(sparsity=0.2), keys, values)
    assert wide.keys.base.form.value.shape[2] == 2 * int(32 * 0.2 / 2) + 200 % 64
    assert wide.values.base.form.value.shape[2] == 2 * int(32 * 0.2 / 2)
    assert {x.dtype for x in (wide.keys.left, wide.keys.base.form.rest.low)} == {torch.float32}


@pytest.mark.system("gear", "exact")
@pytest.mark.parametrize("settings", [{"rank": 16}, {"sparsity": 1.0}])
def test_the_full_rank_and_the_full_share_are_exact(settings):
    keys, values = data(n=40)
    for a, b in zip(coded(Gear(**settings), keys, values).read(), (keys, values), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.system("gear", "exact")
def test_sixteen_bits_change_nothing():
    keys, values = data()
    assert isinstance(Gear(bits=16).evict(KVView.of(keys, values), State())[0], Observe)


@pytest.mark.system("gear", "exact")
@pytest.mark.parametrize(
    ("bits", "group", "s", "r"), [(2, 64, 0.02, 4), (4, 0, 0.02, 4), (2, 64, 0.0, 4), (3, 32, 0.1, 2)]
)
def test_bytes_are_those_of_the_formula(bits, group, s, r):
    b, g, n, d = 2, 4, 512, 64
    keys, values = data(b, g, n, d, dtype=torch.float16)
    block = coded(Gear(bits=bits, group=group, sparsity=s, rank=r), keys, values)
    counts = (n // (group or n) * g * d, g * d // (group or g * d) * n)
    for form, groups, length in zip((block.keys, block.values), counts, (n, g * d), strict=True):
        whole = bits * n * g * d / 8 + 2 * groups * 2 + g * r * (n + d) * 2
        whole += 2 * int(s * length / 2) * (n * g * d // length) * (2 + 2)
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in form.tensors()}
        assert abs(sum(held.values()) / (b * whole) - 1) < 0.01


@pytest.mark.system("gear", "exact")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_half_precision_and_a_sample_is_the_same_in_any_batch(dtype):
    keys, values = data(b=3, n=64, dtype=dtype)
    whole = coded(Gear(sparsity=0.1), keys, values).read()
    one = coded(Gear(sparsity=0.1), keys[1:2], values[1:2]).read()
    for x, own in zip(whole, one, strict=True):
        assert x.dtype == dtype
        assert torch.equal(x[1:2], own)
    keys[0, 0, 3, 2] = torch.nan
    assert coded(Gear(sparsity=0.1), keys, values).read()[0][1:].isfinite().all()


def _error(make, **settings):
    keys, values = data(g=1, n=256, d=32, seed=3)
    found = make(Gear(**({"rank": 4, "sparsity": 0.13} | settings)), keys, values).read()
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, (keys, values), strict=True)]


def _errors_are_ordered(make):
    """D > D + L > D + S + L, and D > D + S, for keys and for values."""
    plain, low = _error(make, rank=0, sparsity=0.0), _error(make, sparsity=0.0)
    sparse, both = _error(make, rank=0), _error(make)
    for d, dl, ds, dls in zip(plain, low, sparse, both, strict=True):
        assert d > 1.03 * dl > 1.03 * 1.03 * dls
        assert d > 1.03 * ds > 1.03 * 1.03 * dls


@pytest.mark.system("gear", "directional")
def test_outliers_and_the_low_rank_each_lower_the_error():
    _errors_are_ordered(coded)


def _elsewhere(method, keys, values):
    """Outliers at places that are not theirs, and a low-rank part of something else."""
    block = coded(method, keys, values)
    for form in (block.keys, block.values):
        base = getattr(form, "base", form)
        if hasattr(form, "left"):
            form.left.copy_(form.left.roll(1, 2))
        if hasattr(base.form, "at"):
            base.form.value.copy_(base.form.value.roll(1, 2))
    return block


def test_the_order_fails_for_a_stub():
    for stub in (_elsewhere, lambda method, k, v: _integers(method, k, v, "encode")):
        with pytest.raises(AssertionError):
            _errors_are_ordered(stub)


PLAN = "gear:every=8,group=4,sparsity=0.3,rank=2,later_rank=1"
METHOD = Gear(every=8, group=4, sparsity=0.3, rank=2, later_rank=1)


@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.system("gear", "model")
def test_a_padded_batch_equals_each_sample_by_hand(build):
    check_against_changed(build, PLAN, codecs_of(METHOD))


@pytest.mark.system("gear", "model", build="llama")
def test_after_an_eviction_the_kept_slots_are_compressed():
    got = check_with_eviction("snapkv:keep=50%,window=4", PLAN, codecs_of(METHOD))
    assert got.past_key_values.layers[0].store.lots[0].coded == 16


@torch.no_grad()
def test_bytes_on_a_model_with_and_without_an_eviction():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((640, 640))
    b, g, d = 2, 2, 16
    for plan, n, places in (("gear", 640, 0), ("snapkv:keep=30% + gear", 192, 4)):
        with winnow.compress(model, plan) as handle:
            model(**inputs)
            ledger = handle.last
        low_rank = g * 4 * (n + d) * 4
        keys = n * g * d / 4 + 2 * n // 64 * g * d * 4 + low_rank + 2 * int(0.01 * n) * g * d * 6
        values = n * g * d / 4 + 2 * n * 4 + low_rank + 2 * int(0.01 * g * d) * n * 6
        wanted = 3 * b * (keys + values + places * g * n)
        assert abs(ledger.kv_bytes / wanted - 1) < 0.01
        assert ledger.kv_slots == (b * g * n,) * 3
        assert ledger.kv_bytes_full == 3 * b * 640 * g * 2 * d * 4


def test_bad_settings_are_refused():
    for settings in ({"bits": 5}, {"sparsity": 1.5}, {"rank": -1}, {"counted": "both"}):
        with pytest.raises(WinnowError, match="allowed"):
            Gear(**settings)
