"""Attention to what is beside the sequence: against row by row, and what cannot be seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.parts.cross_attention import Beside, GatedHeads, GatedStates, attend, attend_naive, kept_beside, placed
from winnow.parts.learned import untrained
from winnow.parts.sinusoid import sinusoid_naive

H, G, D, W = 4, 2, 6, 12


def drawn(n, r, seed=0, lanes=()):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(*lanes, H, n, D, generator=generator)
    k, v = (torch.randn(*lanes, G, r, D, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize(("n", "r"), [(1, 9), (5, 9), (7, 1)])
def test_the_fast_form_is_row_by_row_and_head_by_head(n, r):
    q, k, v = drawn(n, r)
    seen = torch.rand(n, r, generator=torch.Generator().manual_seed(1)) > 0.4
    for mask in (seen, seen[:1], torch.ones(1, r, dtype=torch.bool)):
        assert (attend(q, k, v, mask) - attend_naive(q, k, v, mask)).abs().max() <= 1e-5


def test_lanes_are_their_own():
    q, k, v = drawn(3, 5, lanes=(2,))
    seen = torch.tensor([[[True] * 5], [[True] * 3 + [False] * 2]])
    both = attend(q, k, v, seen)
    for lane in range(2):
        assert (both[lane] - attend_naive(q[lane], k[lane], v[lane], seen[lane])).abs().max() <= 1e-5


def test_what_cannot_be_seen_does_not_matter_and_nothing_seen_is_nothing_read():
    q, k, v = drawn(3, 5)
    seen = torch.tensor([[True, False, True, True, False]])
    other = v.clone()
    other[:, [1, 4]] = 1e6
    assert torch.equal(attend(q, k, other, seen), attend(q, k, v, seen))
    assert torch.equal(attend(q, k, v, torch.zeros(1, 5, dtype=torch.bool)), torch.zeros(3, H * D))


def test_broken_tokens_are_hidden():
    readers = untrained(lambda: torch.nn.ModuleDict({"0": GatedStates(W, H, G, D)}))
    x = torch.randn(1, 6, W, generator=torch.Generator().manual_seed(0))
    x[0, 2] = torch.nan
    view = View.of(x)
    kept = kept_beside(readers, x, view)
    assert int(view.notes["nan_scores"]) == 1
    assert kept["seen"].tolist() == [[[True, True, False, True, True, True]]]
    assert all(own.isfinite().all() for own in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_modules_keep_their_dtype_whatever_comes(dtype):
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(1, 9, W, generator=generator), torch.randn(3, W, generator=generator)
    states, heads = (untrained(lambda kind=kind: kind(W, H, G, D)).to(dtype) for kind in (GatedStates, GatedHeads))
    k, v = states.beside(x)
    seen = torch.ones(1, 9, dtype=torch.bool)
    assert states(h, k[0], v[0], seen).dtype == dtype
    o, q = torch.randn(3, H * D, generator=generator), torch.randn(H, 3, D, generator=generator)
    k, v = heads.beside(x)
    assert heads(o, q, k[0], v[0], seen).dtype == dtype


def test_keys_alone_know_where_tokens_stand():
    beside = untrained(lambda: Beside(W, G, D))
    x = torch.randn(1, 4, W, generator=torch.Generator().manual_seed(0))
    (k, v), (placed, same) = beside(x), beside(x, torch.ones(1, 4, W))
    assert torch.equal(v, same)
    assert (k - placed).abs().max() > 1e-2


def test_places_are_frame_row_and_column_each_in_a_third_of_the_channels():
    view = View.of(torch.zeros(1, 12, 14), layout=Layout.grid(2, 2, 3))
    view = replace(view, tokens=view.tokens[:, :2], ids=torch.tensor([[6, 11]]))
    made = placed(view)[0]
    for row, spot in enumerate([(1, 1, 0), (2, 1, 1)]):
        want = [number for at in spot for number in sinusoid_naive(at, 4)]
        assert made[row].tolist() == pytest.approx([*want, 0.0, 0.0], abs=1e-6)
