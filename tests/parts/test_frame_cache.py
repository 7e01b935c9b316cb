"""The cache of a stream of frames against versions written out in loops."""

from __future__ import annotations

import math

import pytest
import torch

from winnow.cache.rotary import Rotary
from winnow.parts.frame_cache import between, closing, participation, unmoved

ROTARY = Rotary(torch.tensor([1.0, 0.3, 0.1, 1.5, 3.0, 0.7]), interleaved=True)
TIME = (0, 1, 2)


def keys(n=20, seed=0, dtype=torch.float32):
    return torch.randn(2, 3, n, 14, generator=torch.Generator().manual_seed(seed)).to(dtype)


def turned_by_hand(x, shift, frequencies, interleaved, pairs):
    """Each pair as a complex number."""
    made, r = x.double().clone(), len(frequencies)
    for place in pairs:
        a, b = (2 * place, 2 * place + 1) if interleaved else (place, place + r)
        number = torch.complex(x[..., a].double(), x[..., b].double())
        turn = number * torch.polar(torch.ones(()).double(), shift.double() * float(frequencies[place]))
        made[..., a], made[..., b] = turn.real, turn.imag
    return made


@pytest.mark.system("deep-forcing", "exact")
@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotation_of_time_alone_turns_these_pairs_and_no_other(interleaved):
    rotary = Rotary(ROTARY.frequencies, interleaved)
    x, shift = keys(), torch.randint(-50, 50, (2, 3, 20), generator=torch.Generator().manual_seed(1))
    got = rotary.only(TIME).turn(x, shift)
    torch.testing.assert_close(
        got.double(), turned_by_hand(x, shift, ROTARY.frequencies, interleaved, TIME), atol=1e-5, rtol=1e-5
    )
    moved = {2 * p + i if interleaved else p + 6 * i for p in TIME for i in (0, 1)}
    rest = [d for d in range(14) if d not in moved]
    assert torch.equal(got[..., rest], x[..., rest])
    assert not torch.allclose(rotary.turn(x, shift)[..., rest], x[..., rest])


@pytest.mark.system("deep-forcing", "exact")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_shift_leaves_the_bits_and_shifts_add_up(dtype):
    rotary, x = ROTARY.only(TIME), keys(dtype=dtype)
    by = [torch.full((2, 3, 20), n) for n in (0, 7, 35, 42)]
    assert torch.equal(rotary.turn(x, by[0]), x)
    twice, once = rotary.turn(rotary.turn(x, by[1]), by[2]), rotary.turn(x, by[3])
    torch.testing.assert_close(twice, once, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-5)
    assert (rotary.turn(x, by[1]) - once).abs().max() > 0.5


@pytest.mark.system("deep-forcing", "exact")
def test_turning_from_the_first_keys_does_not_add_up_rounding():
    """A sink that moves by one step a thousand times: from its first keys, and step by step."""
    rotary, x = ROTARY.only(TIME), keys(dtype=torch.bfloat16)
    exact = turned_by_hand(x, torch.tensor(1000), ROTARY.frequencies, True, TIME)
    ours, worse = x, x
    first, shift = x, torch.zeros(2, 3, 20, dtype=torch.int64)
    for _ in range(1000):
        first = unmoved(ours, first, shift)
        shift = shift + 1
        ours = rotary.turn(first, shift)
        worse = rotary.turn(worse, torch.ones_like(shift))
    assert (ours.double() - exact).abs().max() < 0.02
    assert (worse.double() - exact).abs().max() > 0.1


def chosen_by_hand(queries, x, sink, top, recent):
    """Token by token, with sums in double precision."""
    b, h, q, _ = queries.shape
    g, n = x.shape[1:3]
    found = torch.empty(b, g, sink + top + recent, dtype=torch.int64)
    for i in range(b):
        for head in range(g):
            scores = []
            for j in range(sink, n - recent):
                own = range(head * (h // g), (head + 1) * (h // g))
                scores.append(
                    sum(float(queries[i, k, r].double() @ x[i, head, j].double()) for k in own for r in range(q))
                )
            best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:top]
            found[i, head] = torch.tensor([*range(sink), *(sink + j for j in sorted(best)), *range(n - recent, n)])
    return found


@pytest.mark.system("deep-forcing", "exact")
@pytest.mark.parametrize(("sink", "top", "recent"), [(5, 4, 3), (0, 6, 4), (8, 0, 2), (3, 9, 8)])
def test_top_slots_of_each_head_are_those_of_the_loop(sink, top, recent):
    queries = torch.randn(2, 6, recent, 14, generator=torch.Generator().manual_seed(3))
    got = between(participation(queries, keys()), sink, top, recent)
    assert torch.equal(got, chosen_by_hand(queries, keys(), sink, top, recent))
    if top and sink + top + recent < 20:
        assert not torch.equal(got[:, 0], got[:, 1])  # each head for itself
        newest = torch.arange(20).float().expand(2, 3, -1)
        assert not torch.equal(between(newest, sink, top, recent), got)


def test_equal_scores_keep_the_earlier_slot_and_nan_is_never_preferred():
    flat = between(torch.zeros(1, 1, 12), 2, 3, 2)
    assert flat.tolist() == [[[0, 1, 2, 3, 4, 10, 11]]]
    broken = torch.zeros(1, 1, 12)
    broken[..., 3] = torch.nan
    assert between(broken, 2, 3, 2).tolist() == [[[0, 1, 2, 4, 5, 10, 11]]]


@pytest.mark.system("deep-forcing", "exact")
@pytest.mark.parametrize("frame", [1, 4])
def test_what_is_kept_closes_up_in_time(frame):
    generator = torch.Generator().manual_seed(0)
    sink, top, recent, n = 3 * frame, 2 * frame, 2 * frame, 20 * frame
    index = between(torch.randn(2, 3, n, generator=generator), sink, top, recent)
    shift = closing(index, frame)
    now = index // frame + shift
    assert torch.equal(now, (torch.arange(7 * frame) // frame + 13).expand(2, 3, -1))
    assert (shift[..., -recent:] == 0).all()
    # the sink moves by t(first frame behind it) − t(its last frame) − 1, whatever lies between
    plain = torch.cat([torch.arange(sink), torch.arange(n - 4 * frame, n)]).expand(1, 1, -1)
    assert closing(plain, frame)[0, 0, :sink].tolist() == [16 - 2 - 1] * sink
    assert (closing(torch.arange(n).expand(1, 1, -1), frame) == 0).all()


def test_an_angle_beyond_a_turn_is_that_angle():
    rotary = Rotary(torch.tensor([math.pi / 2]), interleaved=True)
    x = torch.tensor([[[[1.0, 0.0]]]])
    torch.testing.assert_close(
        rotary.turn(x, torch.full((1, 1, 1), 5)), torch.tensor([[[[0.0, 1.0]]]]), atol=1e-5, rtol=0
    )
