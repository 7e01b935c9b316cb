"""Blocks that are alike become one, and are read and moved as they would be one behind the other."""

from __future__ import annotations

import torch

from winnow.parts.forms import Both, Lines, Plain, lines_of
from winnow.parts.quantize import Quantized
from winnow.parts.repair import Repaired, Spiked


def _block(seed, n=8, b=2):
    keys, values = torch.randn(2, b, 3, n, 4, generator=torch.Generator().manual_seed(seed))
    spiked = Lines(Spiked.of(lines_of(keys, "tokens"), 1, 4, 4, torch.float32), 3, "tokens")
    start = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0))
    low = Repaired.of(keys, spiked, start, 2, torch.float32)
    return Both(low, Lines(Quantized.of(lines_of(values, "channels"), 2, 4), 3, "channels"), n)


def test_lines_and_back():
    x = torch.randn(2, 3, 5, 4)
    for along in ("tokens", "channels"):
        assert torch.equal(Lines(Plain(lines_of(x, along)), 3, along).read(), x)
    assert lines_of(x, "tokens").shape == (2, 12, 5)
    assert lines_of(x, "channels").shape == (2, 5, 12)


def test_alike_blocks_are_read_as_if_one_stood_behind_the_other():
    blocks = [_block(seed) for seed in range(3)]
    whole = blocks[0].joined(blocks[1]).joined(blocks[2])
    assert (whole.length, whole.count) == (24, 3)
    for i in range(2):
        wanted = torch.cat([block.read()[i] for block in blocks], 2)
        torch.testing.assert_close(whole.read()[i], wanted, atol=1e-6, rtol=1e-6)
    order = torch.tensor([1, 0, 1])
    moved = whole.rows(lambda x: x[order])
    for a, b in zip(moved.read(), whole.read(), strict=True):
        torch.testing.assert_close(a, b[order], atol=1e-6, rtol=1e-6)
    assert sum(x.nbytes for x in whole.tensors()) == 3 * sum(x.nbytes for x in blocks[0].tensors())


def test_blocks_that_differ_stay_apart():
    first = _block(0)
    assert first.joined(_block(1, n=12)) is None
    assert first.joined(Both(first.values, first.values, 8)) is None
    assert first.joined(first.joined(_block(1))) is None
