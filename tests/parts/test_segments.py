"""Segments of a video's frames, against loops over lists, and against all segmentations that there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from winnow.parts.density_peaks import density_peaks_naive
from winnow.parts.segments import (
    _contiguous,
    contiguous_naive,
    cut_where_unlike,
    cut_where_unlike_naive,
    density_segments,
    ends,
    most_saved,
    most_saved_naive,
    neighbour_cosine,
)


def _random(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _scenes(lengths, d=16, noise=0.0, seed=0):
    """Frames of scenes that have nothing in common, `[1, T, d]`."""
    scene = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    frames = torch.eye(len(lengths), d)[scene]
    return (frames + noise * _random(seed, len(scene), d))[None], scene[None]


@pytest.mark.parametrize("frames", [1, 2, 3, 9, 32])
def test_cuts_equal_the_naive_ones(frames):
    for seed in range(6):
        alike = (_random(seed, 3, frames - 1) * 8).round() / 8  # with ties
        for threshold, least in ((0.0, 1), (0.4, 1), (0.0, 4), (0.3, 8), (2.0, 1)):
            found = cut_where_unlike(alike, threshold, least)
            assert found.tolist() == [cut_where_unlike_naive(own, threshold, least) for own in alike.tolist()]


def test_scenes_are_cut_where_they_end():
    frames, scene = _scenes([8, 8, 8, 8], noise=0.05)
    alike = neighbour_cosine(frames)
    assert torch.equal(cut_where_unlike(alike, -1.0, 4), scene)
    assert torch.equal(cut_where_unlike(alike, 0.9), scene)
    assert cut_where_unlike(alike, -1.0).amax() == 0
    first, last = ends(scene)
    assert first[0, ::8].tolist() == [0, 8, 16, 24]
    assert last[0, ::8].tolist() == [7, 15, 23, 31]
    assert torch.equal(density_segments(frames, 4, 7), scene)


def test_cosine_beside_a_broken_frame_cuts():
    frames, _ = _scenes([6])
    frames[0, 2, 3] = torch.nan
    assert neighbour_cosine(frames)[0].tolist() == [1, 0, 0, 1, 1]
    assert cut_where_unlike(torch.tensor([[1.0, torch.nan, 1.0]]), 0.5).tolist() == [[0, 0, 1, 1]]
    assert density_segments(frames, 2, 3).shape == (1, 6)


def test_contiguous_equals_frame_by_frame():
    for labels in itertools.chain(itertools.product(range(3), repeat=6), itertools.product(range(2), repeat=9)):
        assert _contiguous(labels) == contiguous_naive(labels)


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        ([0, 1, 2], [0, 0, 0]),  # no cluster has two frames in a row
        ([0, 0, 1, 0], [0, 0, 0, 0]),  # the lone frames go to the run beside them
        ([0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]),  # a shorter run goes to its neighbour
        ([0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2]),  # both longest runs stay
        ([0, 0, 2, 1, 1], [0, 0, 0, 1, 1]),  # the left one among equals
        ([0, 0, 2, 1, 1, 1], [0, 0, 1, 1, 1, 1]),  # else the longer one
    ],
)
def test_contiguous_by_hand(labels, want):
    assert _contiguous(labels) == contiguous_naive(labels) == want


def test_density_segments_are_clusters_made_contiguous():
    for seed in range(6):
        frames = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(seed)).cumsum(1)
        found = density_segments(frames, 4, 7)
        for own, video in zip(found.tolist(), frames.double().tolist(), strict=True):
            assert own == contiguous_naive(density_peaks_naive(video, 4, 7)[1])


@pytest.mark.parametrize(("frames", "longest"), [(1, None), (2, None), (7, None), (7, 3), (16, None), (16, 5)])
def test_dynamic_programming_equals_the_naive_one(frames, longest):
    for seed in range(8):
        same = _random(seed, 3, frames - 1, 5) < 0.3 + 0.08 * seed
        segment, saved = most_saved(same, longest)
        for own, total, video in zip(segment.tolist(), saved.tolist(), same.tolist(), strict=True):
            assert (own, total) == most_saved_naive(video, longest)


def test_no_segmentation_saves_more():
    """All 2^(T − 1) of them."""
    for seed in range(12):
        frames = 2 + seed % 7
        same = _random(seed, 1, frames - 1, 6) < 0.7
        best = 0
        for cuts in itertools.product((0, 1), repeat=frames - 1):
            total = 0
            for _, own in itertools.groupby(range(frames), key=lambda i: sum(cuts[:i])):
                held = list(own)
                total += (len(held) - 1) * int(same[0, held[0] : held[-1]].all(0).sum())
            best = max(best, total)
        assert most_saved(same)[1].item() == best


def test_a_still_video_is_one_segment_and_a_flash_stands_alone():
    still = torch.ones(1, 9, 4, dtype=torch.bool)
    segment, saved = most_saved(still)
    assert segment.unique().tolist() == [0]
    assert saved.item() == 4 * 9
    still[0, 3:5] = False  # frame 4 is unlike both of its neighbours
    segment, saved = most_saved(still)
    assert segment.tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 2, 2]]
    assert saved.item() == 4 * (3 + 4)


def test_a_batch_is_its_items():
    same = _random(5, 6, 11, 7) < 0.6
    frames = torch.randn(6, 12, 8, generator=torch.Generator().manual_seed(1))
    alike = neighbour_cosine(frames)
    for i in range(6):
        one = slice(i, i + 1)
        assert torch.equal(most_saved(same[one])[0], most_saved(same)[0][one])
        assert torch.equal(neighbour_cosine(frames[one]), alike[one])
        assert torch.equal(cut_where_unlike(alike[one], 0.1, 3), cut_where_unlike(alike, 0.1, 3)[one])
        assert torch.equal(density_segments(frames[one], 3, 5), density_segments(frames, 3, 5)[one])
