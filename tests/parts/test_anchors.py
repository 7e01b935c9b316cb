"""Anchors of segments, against loops over lists."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from winnow.parts.anchors import (
    anchor_quotas,
    anchor_quotas_naive,
    best_of_frames,
    density_of_rest,
    merged_into_anchors,
    merged_into_anchors_naive,
    with_anchors,
)
from winnow.parts.density_peaks import peak_scores


def _segments(seed, frames, b=3):
    cut = torch.rand(b, frames - 1, generator=torch.Generator().manual_seed(seed)) < 0.3
    return torch.cat([cut.new_zeros(b, 1), cut], 1).long().cumsum(1)


@pytest.mark.parametrize("exact", [True, False])
def test_quotas_equal_the_naive_ones(exact):
    for seed, frames, every, each in itertools.product(range(4), (1, 2, 9, 16), (1, 2, 4, 7), (0, 1, 3, 10)):
        segment, context = _segments(seed, frames), torch.full((frames,), each)
        context[: frames // 3] += exact
        for room in (int(context.max()), 12, 40):
            if room < context.max():
                continue
            found = anchor_quotas(segment, context, every, room, exact)
            want = [anchor_quotas_naive(own, context.tolist(), every, room, exact) for own in segment.tolist()]
            assert found.tolist() == want
            assert found.max() <= room
            assert (found.sum(1) == context.sum()).all() if exact else (found.sum(1) <= context.sum()).all()


def test_anchors_stand_at_the_end_of_a_segment():
    segment = torch.arange(3)[None].repeat_interleave(torch.tensor([8, 1, 5]), 1)
    quotas = anchor_quotas(segment, torch.full((14,), 3), 4, 20)[0].tolist()
    assert quotas == [0, 0, 0, 12, 0, 0, 0, 12, 3, 7, 0, 0, 0, 8]
    lost = anchor_quotas(segment, torch.full((14,), 3), 4, 20, exact=False)[0].tolist()
    assert lost[9:] == [7, 0, 0, 0, 7]
    # 12 anchors do not fit into a frame of 7: every second one has 6.
    assert anchor_quotas(segment, torch.full((14,), 3), 4, 7)[0, :8].tolist() == [0, 6, 0, 6, 0, 6, 0, 6]


def _case(seed, frames=5, places=7, anchors=6):
    generator = torch.Generator().manual_seed(seed)
    x = normalize(torch.randn(frames * places, 8, generator=generator), dim=-1)
    frame = torch.arange(frames).repeat_interleave(places)
    segment = _segments(seed, frames, 1)[0][frame]
    rest = torch.rand(frames * places, generator=generator) < 0.8
    chosen = torch.randperm(frames * places, generator=generator)[:anchors].sort().values
    rest[chosen] = True
    alone = torch.rand(anchors, generator=generator) < 0.5
    return x, frame, segment, rest, chosen, alone


def test_merging_equals_the_naive_one():
    for seed in range(20):
        x, frame, segment, rest, anchors, alone = _case(seed)
        for given in (None, alone):
            found = merged_into_anchors(x, frame, segment, rest, anchors, 0.2, given)
            lists = (each.tolist() for each in (frame, segment, rest, anchors))
            want = merged_into_anchors_naive(x, *lists, 0.2, None if given is None else given.tolist())
            assert torch.allclose(found, want)
            assert torch.allclose(found.sum(1), torch.ones(len(anchors)))


def test_an_anchor_counts_no_less_than_beta_and_equal_ones_go_to_the_first():
    x = torch.eye(4)[[0, 0, 0, 1, 1, 2]]
    frame, segment = torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(6, dtype=torch.int64)
    rows = merged_into_anchors(x, frame, segment, torch.ones(6, dtype=torch.bool), torch.tensor([0, 2, 5]), 0.5)
    # All tokens go once to frame 0, to the first of its two equal anchors, and once to frame 1.
    assert torch.allclose(rows[0], torch.tensor([0.5, 0, 0, 0, 0, 0]) + 0.5 / 6)
    assert rows[1].tolist() == [0, 0, 1, 0, 0, 0]
    assert torch.allclose(rows[2], torch.tensor([0, 0, 0, 0, 0, 0.5]) + 0.5 / 6)


def test_outputs_are_copies_and_anchors_in_the_order_of_the_items_tokens():
    """Two videos whose tokens stand in another order than their frames, of 2 and 3 anchors."""
    frames, places, counts, salient = 3, 4, (5, 6), 3
    generator = torch.Generator().manual_seed(0)
    x = [normalize(torch.randn(12, 8, generator=generator), dim=-1) for _ in counts]
    slot = torch.stack([torch.randperm(12, generator=generator) for _ in counts])
    kept, anchor = (torch.zeros(2, 12, dtype=torch.bool) for _ in range(2))
    kept[:, [0, 4, 8]] = True
    anchor[0, [1, 9]] = True
    anchor[1, [3, 10, 11]] = True
    segment = torch.tensor([[0, 0, 1], [0, 0, 0]])
    masks = [mask.unflatten(1, (frames, places)) for mask in (kept, anchor, kept)]
    found = with_anchors(x, slot, *masks, segment, counts, salient, 0.6)
    assert found.counts == counts
    for i in range(2):
        lane, order = found.lane(i), slot[i].argsort()
        want = order[(kept | anchor)[i]].sort().values
        assert torch.equal(lane.representatives, want)
        frame = torch.arange(12) // 4
        own = slot[i][want[anchor[i][slot[i][want]]]]
        rows = merged_into_anchors(x[i][order], frame, segment[i][frame], ~kept[i], own, 0.6)
        is_anchor = anchor[i][slot[i][lane.representatives]]
        assert torch.equal(lane.to_matrix()[is_anchor][:, order], rows)
        assert torch.equal(lane.to_matrix()[~is_anchor], torch.eye(12)[want[~is_anchor]])


def test_the_best_of_frames_and_the_density_of_the_rest():
    generator = torch.Generator().manual_seed(0)
    tokens, score = torch.randn(2, 3, 9, 4, generator=generator), torch.rand(2, 3, 9, generator=generator)
    best = best_of_frames(score, torch.tensor([2, 0, 4]))
    assert best.sum(2).tolist() == [[2, 0, 4]] * 2
    broken = torch.zeros_like(best)
    broken[1, 2, :7] = True
    found = density_of_rest(tokens, score, broken, (2, 0, 4), 4)
    assert torch.equal(found == -torch.inf, best)
    for i, t in itertools.product(range(2), range(3)):
        rest = (~best[i, t]).nonzero()[:, 0]
        want = peak_scores(tokens[i, t, rest], 4, broken[i, t, rest])[0]
        assert torch.equal(found[i, t, rest], want.clamp_min(torch.finfo(want.dtype).min))
