"""What is allocated: no map of attention, and nothing larger than what the plain model allocates."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from cases import pairs
from probes import Folded, Pick, Probed, Received, Tapped, forward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import winnow

SIDE = 336  # 24 × 24 patches: 576 tokens, beside which a width of 64 is small, so that any N × N table stands out
LETTER = {"qwen2_5_vl": "L", "llava_next": "B"}  # the pictures of that size; A elsewhere
PLANS = {
    "received": Received(keep=64),
    "picked": Pick(keep=64),
    "folded": Folded(),
    "tapped": Tapped(keep=64),
    "probed": Probed(),
}


class Allocations(TorchDispatchMode):
    """The bytes of the storage of every tensor that an operation makes; views of what was there are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.shapes: list[tuple[int, tuple[int, ...], str]] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                size = tensor.untyped_storage().nbytes()
                self.shapes.append((size, tuple(tensor.shape), str(func)))
                self.largest = max(self.largest, size)
        return out


def allocations(model, inputs) -> Allocations:
    """Of a prefill: the last row of logits, as `generate` asks for."""
    with Allocations() as seen:
        forward(model, inputs, logits_to_keep=1)
    return seen


def large(build: str, batch: int = 1):
    """576 tokens for each picture; one tile, or one grid, or LLaVA-NeXT's smallest mosaic of three tiles."""
    rows = (f"8 {LETTER.get(build, 'A')} 24",) * batch
    return zoo.model(build, side=SIDE), zoo.collate(zoo.samples(build, rows, side=SIDE))


@functools.cache
def largest_of_plain(build: str) -> int:
    return allocations(*large(build)).largest


def test_the_spy_sees_a_map_of_attention():
    """Eager attention makes what is forbidden: were the spy blind, the tests below would mean nothing."""
    model, inputs = large("llava_clip")
    plain = allocations(model, inputs).largest
    model.set_attn_implementation("eager")
    n = inputs["input_ids"].shape[1]
    assert allocations(model, inputs).largest >= 4 * n * n * 4 > plain


@pytest.mark.parametrize(("kind", "build"), pairs(list(PLANS)))
def test_nothing_is_larger_than_in_the_plain_run(kind, build):
    """By shape, too: no new tensor has two axes of the length of the tokens and one of the heads before them.

    What a method's own step makes is checked without a model (`check_memory`).
    """
    model, inputs = large(build)
    plain = largest_of_plain(build)
    n, tokens = inputs["input_ids"].shape[1], zoo.tokens_of(build, LETTER.get(build, "A"), SIDE)
    with winnow.compress(model, PLANS[kind]):
        forward(model, inputs)
        seen = allocations(model, inputs)
    worst = max(seen.shapes)
    assert worst[0] <= plain, f"{worst} beside {plain} bytes"
    lengths = range(min(tokens, 576), n + 2)
    for _, shape, operation in seen.shapes:
        wide = [size for size in shape if size in lengths]
        heads = [size for size in shape if size == 4]
        assert len(wide) < 2 or not heads, f"{operation} made {shape}"


@pytest.mark.parametrize(("kind", "build"), pairs(["received", "probed"]))
def test_a_batch_of_two_needs_no_more_than_twice_that_of_one(kind, build):
    """Views are dense over the items, and each table belongs to one item."""
    model, one = large(build)
    _, two = large(build, batch=2)
    with winnow.compress(model, PLANS[kind]):
        assert allocations(model, two).largest <= 2 * allocations(model, one).largest


@pytest.mark.parametrize(("kind", "build"), pairs(["probed"]))
def test_padding_brings_no_larger_masks_than_the_plain_model_has(kind, build):
    """A ragged batch is given a mask by transformers itself; layers behind a cut get smaller ones."""
    model, _ = large(build)
    letter = LETTER.get(build, "A")
    parts = [zoo.sample(build, row, side=SIDE) for row in (f"8 {letter} 24", f"8 {letter} 9")]
    inputs = zoo.collate(parts)
    plain = allocations(model, inputs).largest
    with winnow.compress(model, PLANS[kind]):
        assert allocations(model, inputs).largest <= plain
