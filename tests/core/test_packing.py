"""Packing against loops: which slots are kept, where they arrive, and how outputs get their length back."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.packing import Packing


@st.composite
def batches(draw):
    """A padded batch, some of whose rows may be empty, and how much of it is kept; one row always keeps something."""
    width = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(0, width), min_size=1, max_size=4))
    sizes[draw(st.integers(0, len(sizes) - 1))] = width
    right = draw(st.booleans())
    slots = torch.arange(width).expand(len(sizes), width)
    count = torch.tensor(sizes)[:, None]
    mask = slots < count if right else slots >= width - count
    seed = draw(st.integers(0, 2**31))
    return Packing.of(mask, tuple(sizes), right), torch.Generator().manual_seed(seed), draw(st.floats(0, 1))


def _kept(packing, generator, share):
    kept = packing.mask & (torch.rand(packing.mask.shape, generator=generator) < share)
    if not kept.any():
        row = packing.sizes.index(max(packing.sizes))
        kept[row] = packing.mask[row]
    return kept, tuple(kept.sum(1).tolist())


def _held(packing):
    """The logical positions that each row holds, in the order of the slots."""
    return [
        [p for p, real in zip(row, m, strict=True) if real]
        for row, m in zip(packing.source.tolist(), packing.mask.tolist(), strict=True)
    ]


@given(batches())
def test_keep_holds_what_was_kept_in_order(batch):
    packing, generator, share = batch
    for _ in range(2):
        kept, sizes = _kept(packing, generator, share)
        new, slots = packing.select(kept, sizes)
        want = [row[k].tolist() for row, k in zip(packing.source, kept, strict=True)]
        assert _held(new) == want
        assert new.width == max(sizes)
        assert new.sizes == sizes
        assert new.logical == packing.logical
        for mask, size in zip(new.mask.tolist(), sizes, strict=True):
            pad = [False] * (new.width - size)
            assert mask == ([True] * size + pad if packing.right else pad + [True] * size)
        assert torch.equal(packing.source.gather(1, slots), new.source)
        packing = new


@given(batches())
def test_arrivals_are_where_kept_slots_went(batch):
    packing, generator, share = batch
    kept, sizes = _kept(packing, generator, share)
    new, slots = packing.select(kept, sizes)
    arrivals = packing.arrivals(slots)
    for row in range(len(sizes)):
        for slot in range(packing.width):
            if kept[row, slot]:
                assert new.source[row, arrivals[row, slot]] == packing.source[row, slot]
                assert new.mask[row, arrivals[row, slot]]


@given(batches())
def test_to_logical_repeats_the_survivor_before(batch):
    packing, generator, share = batch
    real = packing.mask
    for _ in range(3):
        index = packing.to_logical()
        assert index.shape == (len(packing.sizes), packing.logical)
        for row in range(len(packing.sizes)):
            held = {p.item(): slot for slot, p in enumerate(packing.source[row]) if packing.mask[row, slot]}
            padding = {p.item(): slot for slot, p in enumerate(packing.source[row]) if not real[row, p]}
            for position in range(packing.logical):
                survivors = [p for p in held if p <= position]
                if not real[row, position] and position in padding:
                    assert index[row, position] == padding[position]  # its own state
                elif survivors and real[row, position]:
                    assert index[row, position] == held[max(survivors)]
                else:
                    assert 0 <= index[row, position] < packing.width  # nothing read so far: any state will do
        packing, _ = packing.select(*_kept(packing, generator, share))


@given(batches())
def test_keeping_all_moves_nothing(batch):
    packing, _, _ = batch
    new, slots = packing.select(packing.mask, packing.sizes)
    assert torch.equal(new.source[new.mask], packing.source[packing.mask])
    assert torch.equal(new.mask, packing.mask)
    assert torch.equal(slots[new.mask], torch.arange(packing.width).expand_as(slots)[new.mask])


def test_order_holds_in_long_rows():
    """Beyond a few elements an unstable sort shows."""
    mask = torch.ones(2, 1000, dtype=torch.bool)
    kept = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) < 0.3
    for right in (False, True):
        new, _ = Packing.of(mask, (1000, 1000), right).select(kept, tuple(kept.sum(1).tolist()))
        assert _held(new) == [row.nonzero()[:, 0].tolist() for row in kept]


def test_padded():
    assert not Packing.of(torch.ones(2, 3, dtype=torch.bool), (3, 3)).padded
    assert Packing.of(torch.tensor([[False, True], [True, True]]), (1, 2)).padded


def test_golden_left_and_right():
    mask = torch.tensor([[False, True, True, True], [True, True, True, True]])
    kept = torch.tensor([[False, True, False, True], [True, False, True, True]])
    new, slots = Packing.of(mask, (3, 4)).select(kept, (2, 3))
    assert new.mask.tolist() == [[False, True, True], [True, True, True]]
    assert [r[-2:] for r in slots.tolist()] == [[1, 3], [2, 3]]
    assert new.to_logical()[1].tolist() == [0, 0, 1, 2]
    right, _ = Packing.of(mask.flip(1), (3, 4), right=True).select(kept.flip(1), (2, 3))
    assert right.source[0, :2].tolist() == [0, 2]
    assert right.mask.tolist() == [[True, True, False], [True, True, True]]
