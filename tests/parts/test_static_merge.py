"""What becomes of the windows of a video: groups, counts, and the weights of what is merged."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.density_peaks import density_peaks_naive
from winnow.parts.static_merge import (
    Group,
    each_rounded,
    groups_of,
    in_total,
    shortened,
    stacked,
    unchanged,
)


def _random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_unchanged_is_alike_and_sound():
    x = torch.nn.functional.normalize(_random(0, 1, 4, 8), dim=-1)
    x[0, 2] = x[0, 0]
    at, broken = torch.arange(4)[None], torch.zeros(1, 4, dtype=torch.bool)
    assert unchanged(list(x), at, 2, 0.9, broken).tolist() == [[[True, False]]]
    assert unchanged(list(x), at[:, [0, 1, 3, 2]], 2, 0.9, broken).tolist() == [[[False, False]]]
    assert unchanged(list(x), at, 2, 0.9, ~broken).tolist() == [[[False, False]]]


def test_groups_of_windows():
    same = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    found = groups_of(same, [0, 0, 0, 1, 1])
    assert [(own.frames, own.places.tolist(), own.static) for own in found] == [
        (range(3), [0], True),
        *((range(frame, frame + 1), [1, 2], False) for frame in range(3)),
        (range(3, 5), [0, 1, 2], True),
        *((range(frame, frame + 1), [], False) for frame in (3, 4)),
    ]
    assert [own.static for own in groups_of(same, [0, 1, 2, 3, 4])] == [False] * 5


def _sized(*sizes):
    return [Group(range(2), torch.arange(n), i == 0) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("keep", [1, 5, 9, 20, 21, 99])
def test_counts_in_total_are_exact_and_in_proportion(keep):
    counts = in_total(_sized(7, 4, 0, 9), keep)
    assert sum(counts) == min(keep, 20)
    assert all(abs(c - min(keep, 20) * n / 20) < 1 for c, n in zip(counts, (7, 4, 0, 9), strict=True))


def test_counts_that_are_rounded_one_by_one():
    assert each_rounded(_sized(7, 4, 0, 9), 0.25, 40) == [round(3.5), 2, 0, 5]
    assert each_rounded(_sized(5, 4), 0.25, 18) == [2, 2]  # half of five to the even number
    assert each_rounded(_sized(7, 4), 0.9, 40) == [7, 4]


@pytest.mark.parametrize("centre", [0.6, 1.0, 0.0, None])
def test_static_places_are_means_over_time_merged_around_density_peaks(centre):
    x, places = _random(1, 3, 14, 6), torch.tensor([0, 2, 3, 5, 6, 8, 9, 11])
    groups, score = [Group(range(3), places, True)], _random(2, 3, 14)
    made = shortened(groups, [3], x, score, 7, centre)
    means = x[:, places].double().mean(0)
    peaks, owner = density_peaks_naive(means.tolist(), 3, 3)
    want = []
    for peak in sorted(peaks):
        others = [i for i, c in enumerate(owner) if peaks[c] == peak and i != peak]
        if centre is None or not others:
            want.append(means[[peak, *others]].mean(0))
        else:
            want.append(centre * means[peak] + (1 - centre) * means[others].mean(0))
    reduction = stacked([made], torch.arange(42)[None], True)
    assert reduction.representatives[0].tolist() == places[sorted(peaks)].tolist()
    torch.testing.assert_close(reduction.apply(x.flatten(0, 1)[None])[0].double(), torch.stack(want))
    assert reduction.is_stochastic


def test_frames_keep_their_best_and_no_count_keeps_none():
    x, score = _random(3, 2, 5, 4), torch.tensor([[1.0, 3, 2, 5, 4], [5, 4, 3, 2, 1]])
    groups = [
        Group(range(2), torch.tensor([0]), True),
        *(Group(range(f, f + 1), torch.tensor([1, 2, 3, 4]), False) for f in (0, 1)),
    ]
    made = shortened(groups, [0, 2, 1], x, score, 7, 0.6)
    assert made.representative.tolist() == [3, 4, 6]
    assert stacked([made], torch.arange(10)[None], True).is_selection


def test_videos_with_unequal_numbers_and_slots_in_another_order():
    x, score = _random(4, 2, 3, 4), _random(5, 2, 3)
    frames = [Group(range(f, f + 1), torch.arange(3), False) for f in (0, 1)]
    one, two = (shortened(frames, counts, x, score, 7, 0.6) for counts in ([1, 2], [1, 1]))
    at = torch.tensor([[3, 4, 5, 0, 1, 2]]).repeat(2, 1)
    reduction = stacked([one, two], at, True)
    assert reduction.counts == (3, 2)
    assert reduction.lane(0).index.tolist() == sorted(at[0, one.representative].tolist())
    own = stacked([one, two], at, False)
    assert own.lane(0).index.tolist() == at[0, one.representative].tolist()
    assert not own.ordered
