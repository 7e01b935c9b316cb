"""Units of a video in a prompt: who reads whom block by block, and a cache in two resolutions, against lists."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.units import Units, allowed, chunked, dense_units, entries_of, two_levels

# Text, then four units of three tokens with times between them, then a question.
TIMED = torch.tensor([0, 0, 2, 2, 2, 0, 2, 2, 2, 0, 2, 2, 2, 0, 2, 2, 2, 0, 0, 0])
PLAIN = torch.tensor([0] * 2 + [2] * 22 + [0] * 3)  # the last of its units of four has two
BARE = torch.tensor([1] * 12)


def mask_by_hand(kinds: list[int], size: int, block: int, previous: int) -> list[list[bool]]:
    """The card's rules, entry by entry."""
    n = len(kinds)
    visual = [i for i in range(n) if kinds[i]]
    first, end = visual[0], visual[-1] + 1
    of = {slot: number // size // block for number, slot in enumerate(visual)}
    made = []
    for q in range(n):
        row = []
        for k in range(n):
            same = q in of and k in of and 0 <= of[q] - of[k] <= previous
            mark = any(first <= x < end and x not in of for x in (q, k))
            row.append(k <= q and (same or k < first or q >= end or mark or q < first))
        made.append(row)
    return made


@pytest.mark.parametrize("kinds", [TIMED, PLAIN, BARE], ids=["timed", "plain", "bare"])
@pytest.mark.parametrize(
    ("size", "block", "previous"), [(3, 1, 0), (3, 2, 1), (4, 1, 2), (2, 2, 0), (3, 9, 0), (3, 1, 99)]
)
def test_the_mask_and_its_parts_are_the_rules(kinds, size, block, previous):
    units = Units.of(kinds, size)
    want = torch.tensor(mask_by_hand(kinds.tolist(), size, block, previous))
    assert torch.equal(allowed(units, block, previous), want)
    parts = chunked(units, block, previous)
    got = torch.zeros_like(want)
    for rows, slots in parts:
        got[rows[:, None], slots] = slots <= rows[:, None]
    end = units.span[1]
    assert torch.equal(got[:end], want[:end])
    assert sorted(row for rows, _ in parts for row in rows.tolist()) == list(range(end))
    lower = end * (end + 1) // 2
    assert entries_of(parts) == (int(want[:end].sum()), lower)


def test_with_enough_blocks_before_it_all_is_read():
    units = Units.of(TIMED, 3)
    assert torch.equal(allowed(units, 1, 4), torch.ones(20, 20).tril().bool())
    whole = 17 * 18 // 2
    assert entries_of(chunked(units, 1, 4)) == entries_of(chunked(units, 0, 0)) == (whole, whole)
    assert entries_of(chunked(units, 1, 0))[0] < entries_of(chunked(units, 1, 1))[0] < whole


def test_the_cost_is_linear_in_the_frames():
    """With a fixed number of blocks before it, a block reads as much, however long the video."""

    def entries(frames: int) -> int:
        return entries_of(chunked(Units.of(torch.full((9 * frames,), 2), 9), 2, 1))[0]

    assert entries(64) - entries(32) == 2 * (entries(32) - entries(16))
    assert entries(64) < 0.15 * (9 * 64) ** 2 / 2


def of_slots(units: Units, dense: torch.Tensor) -> torch.Tensor:
    found = torch.ones(units.n, dtype=torch.bool)
    found[units.slot] = dense[units.unit]
    return found


@pytest.mark.parametrize("step", [1, 2, 3])
def test_two_levels_are_means_of_neighbours_in_units(step):
    units = Units.of(TIMED, 3)
    dense = torch.tensor([True, False, True, False])
    made = two_levels(units, of_slots(units, dense), step)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    got = torch.zeros(len(made.first), 4).index_add_(0, made.target, x * made.weight[:, None])
    want, visual, number = [], [i for i in range(20) if TIMED[i]], 0
    while number < 20:
        place = visual.index(number) if number in visual else -1
        unit = place // 3
        if place < 0 or dense[unit]:
            want.append(x[number])
            number += 1
            continue
        size = min(step, 3 - place % 3)
        want.append(x[number : number + size].mean(0))
        number += size
    torch.testing.assert_close(got, torch.stack(want))
    pooled = 2 * -(-3 // step)
    assert len(made.first) == 20 - 6 + pooled
    assert (made.first.diff() > 0).all()


def test_text_inside_a_unit_stays_and_is_no_part_of_a_mean():
    kinds = torch.tensor([2, 2, 0, 2, 2])
    made = two_levels(Units.of(kinds, 4), torch.zeros(5, dtype=torch.bool), 4)
    assert made.target.tolist() == [0, 0, 1, 0, 0]
    assert made.weight.tolist() == [0.25, 0.25, 1.0, 0.25, 0.25]


def test_the_first_chunk_the_last_and_those_that_are_wanted_are_dense():
    units = Units.of(torch.full((33,), 2), 3)  # eleven units
    assert dense_units(units, (), 2).nonzero()[:, 0].tolist() == [0, 1, 10]
    assert dense_units(units, (5,), 2).nonzero()[:, 0].tolist() == [0, 1, 4, 5, 10]
    assert dense_units(units, (5,), 4).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert dense_units(units, (), 20).all()
