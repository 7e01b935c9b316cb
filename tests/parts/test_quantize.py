"""Packed integers give back what went in; groups are quantised as the definition says, and constant ones exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.parts.quantize import Float8, Quantized, packed, quantized_naive, unpacked


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 99))
def test_packing_loses_nothing_and_no_room(bits, n, seed):
    codes = torch.randint(0, 2**bits, (2, 3, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    bytes_ = packed(codes, bits)
    assert torch.equal(unpacked(bytes_, bits, n), codes)
    if n % 8 == 0:
        assert bytes_.shape[-1] == bits * n // 8


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(0, 50), st.integers(0, 99))
def test_equals_the_definition(bits, n, group, seed):
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed))
    found = Quantized.of(x, bits, group).read()
    wanted = torch.tensor([[quantized_naive(line, bits, group) for line in own] for own in x.double().tolist()])
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)


def test_the_error_is_at_most_half_a_step():
    x = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    form = Quantized.of(x, 4, 16)
    error = (form.read() - x).abs().unflatten(2, (4, 16)).amax(3)
    assert (error <= form.step / 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_groups_and_the_dtype_stay(dtype):
    x = torch.full((1, 2, 10), 0.3, dtype=dtype)
    found = Quantized.of(x, 2, 4).read()
    assert torch.equal(found, x)
    assert Quantized.of(x, 2, 4).low.dtype == dtype
    assert Quantized.of(x, 2, 4, torch.float32).low.dtype == torch.float32


def test_values_of_half_precision_stay_within_half_a_step_and_their_own_rounding():
    x = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    form = Quantized.of(x, 2, 64)
    error = (form.read().float() - x.float()).abs().unflatten(2, (2, 64)).amax(3)
    assert (error <= form.step.float() * 0.52 + 0.02).all()


def test_nan_stays_in_its_group():
    x = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    clean = Quantized.of(x, 4, 8).read()
    x[..., 3] = torch.nan
    assert torch.equal(Quantized.of(x, 4, 8).read()[..., 8:], clean[..., 8:])


def test_fp8_is_a_cast_that_saturates():
    x = torch.tensor([[0.1, -3.0, 1000.0, -1e9, 448.0]])
    assert torch.equal(Float8.of(x).read(), torch.tensor([[0.1015625, -3.0, 448.0, -448.0, 448.0]]))


def test_rows_move_with_all_that_belongs_to_them():
    x = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 0])
    for form in (Quantized.of(x, 4, 8), Float8.of(x)):
        moved = form.rows(lambda own: own[order])
        assert torch.equal(moved.read(), form.read()[order])
        assert [t.shape[0] for t in moved.tensors()] == [3] * len(list(form.tensors()))
