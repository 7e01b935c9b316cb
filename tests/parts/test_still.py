"""Places that stand still, and groups of tokens merged among themselves, against loops."""

from __future__ import annotations

import torch

from winnow.parts.density_peaks import density_peaks_naive
from winnow.parts.still import Group, clusters_of, groups_of, merged_groups, still_places, still_places_naive


def _walk(seed, frames, places, d=8, step=1.0):
    """Tokens of which some change more than others from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(frames, places, d, generator=generator) * torch.rand(1, places, 1, generator=generator) * step
    return torch.randn(1, places, d, generator=generator) + moves.cumsum(0)


def test_still_places_equal_the_mean_of_all_pairs():
    for seed in range(6):
        frames = _walk(seed, 2 + seed, 11)
        for threshold in (-1.0, 0.5, 0.8, 0.95, 1.1):
            assert still_places(frames, threshold).tolist() == still_places_naive(frames, threshold)
        assert 0 < still_places(frames, 0.9).sum() < 11


def test_nothing_stands_still_in_one_frame_or_where_a_token_is_broken():
    frames = torch.ones(3, 4, 8)
    assert still_places(frames, 0.8).all()
    assert not still_places(frames[:1], -1).any()
    broken = torch.zeros(3, 4, dtype=torch.bool)
    broken[1, 2] = True
    assert still_places(frames.masked_fill(broken[..., None], torch.nan), 0.8, broken).tolist() == [1, 1, 0, 1]


def test_groups_are_of_a_segment_what_stands_still_then_each_frame():
    eye = torch.eye(8)
    frames = torch.stack([eye[[0, 1, 2]], eye[[0, 3, 2]], eye[[4, 5, 6]]])
    found = groups_of(frames, [0, 0, 1], 0.8, torch.zeros(3, 3, dtype=torch.bool))
    assert [(list(group.frames), group.places.tolist()) for group in found] == [
        ([0, 1], [0, 2]),
        ([0], [1]),
        ([1], [1]),
        ([2], [0, 1, 2]),
    ]


def test_clusters_are_density_peaks_of_the_mean_over_time():
    frames, broken = _walk(0, 4, 40), torch.zeros(4, 40, dtype=torch.bool)
    group = Group(range(1, 4), torch.arange(3, 33))
    centres, owner = clusters_of(group, frames, broken, 0.5, 7, 14)
    want = density_peaks_naive(frames[1:4, 3:33].mean(0).double().tolist(), 15, 7)
    assert ((centres - 3).tolist(), owner.tolist()) == want
    few = Group(range(1, 2), torch.arange(14))
    assert [each.tolist() for each in clusters_of(few, frames, broken, 0.5, 7, 14)] == [list(range(14))] * 2


def test_merged_groups_are_means_of_their_clusters():
    frames, broken = _walk(1, 6, 40), torch.zeros(6, 40, dtype=torch.bool)
    broken[4, 7] = True
    groups = groups_of(frames, [0, 0, 0, 0, 1, 1], 0.97, broken)
    sizes = {own.frames: len(own.places) for own in groups}
    assert min(sizes.values()) <= 14 < sizes[range(4, 5)]
    group, target, weight, anchors = merged_groups(frames, broken, groups, 0.5, 7, 14)
    flat = frames.flatten(0, 1)
    merged = torch.zeros(len(anchors), 8).index_add(0, target.clamp_min(0), flat * (weight * (target >= 0))[:, None])
    row = 0
    for number, own in enumerate(groups):
        centres, owner = clusters_of(own, frames, broken, 0.5, 7, 14)
        for cluster, centre in enumerate(centres.tolist()):
            members = own.places[owner == cluster]
            want = frames[own.frames.start : own.frames.stop, members].mean((0, 1))
            assert torch.allclose(merged[row], want, atol=1e-5)
            assert anchors[row] == own.frames.start * 40 + centre
            assert (group.unflatten(0, (6, 40))[own.frames.start : own.frames.stop, members] == number).all()
            row += 1
    assert row == len(anchors)
    assert target[4 * 40 + 7] == -1
    assert ((target >= 0) | broken.flatten()).all()
