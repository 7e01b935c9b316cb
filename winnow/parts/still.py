"""Places of a video that stay as they are, and the groups of tokens that follow from them (PruneVid)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from winnow.core.reduction import Reduction
from winnow.parts.density_peaks import density_peaks


class Group(NamedTuple):
    """Tokens that are merged among themselves.

    Attributes:
        frames: of the segment, for places that stay as they are; else one.
        places: of the frame, ascending.
    """

    frames: range
    places: Int[Tensor, " n"]


def still_places(
    frames: Float[Tensor, "w p d"], threshold: float, broken: Bool[Tensor, "w p"] | None = None
) -> Bool[Tensor, " p"]:
    """Places whose tokens have a mean cosine above a threshold, over all pairs of frames; none in a single frame."""
    width = frames.shape[0]
    bad = torch.zeros_like(frames[..., 0], dtype=torch.bool) if broken is None else broken
    if width == 1:
        return torch.zeros_like(bad[0])
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32)).masked_fill(bad[..., None], 0)
    x = normalize(wide, dim=-1)
    pairs = x.sum(0).square().sum(-1) - x.square().sum(-1).sum(0)
    return (pairs / (width * (width - 1)) > threshold) & ~bad.any(0)


def groups_of(
    frames: Float[Tensor, "t p d"], segment: Sequence[int], threshold: float, broken: Bool[Tensor, "t p"]
) -> list[Group]:
    """Of each segment the places that stay as they are, then the others of each frame; none is empty."""
    found: list[Group] = []
    start = 0
    while start < len(segment):
        end = start + sum(number == segment[start] for number in segment)
        still = still_places(frames[start:end], threshold, broken[start:end])
        parts = [(range(start, end), still), *((range(t, t + 1), ~still) for t in range(start, end))]
        found += [Group(own, places.nonzero()[:, 0]) for own, places in parts if bool(places.any())]
        start = end
    return found


def clusters_of(
    group: Group,
    frames: Float[Tensor, "t p d"],
    broken: Bool[Tensor, "t p"],
    share: float,
    neighbours: int,
    small: int,
) -> tuple[Int[Tensor, " c"], Int[Tensor, " n"]]:
    """The places of a group that are centres of its clusters, best first, and to which of them each place belongs.

    Args:
        share: of the group's places that are centres.
        neighbours: by which density is measured.
        small: places up to which nothing is merged, and each is its own, in order.
    """
    count = group.places.shape[0]
    if count <= small:
        return group.places, torch.arange(count, device=frames.device)
    own = slice(group.frames.start, group.frames.stop)
    wide = frames[own][:, group.places].to(torch.promote_types(frames.dtype, torch.float32)).mean(0)
    bad = broken[own][:, group.places].any(0)
    centres, owner = density_peaks(wide[None], max(1, int(count * share)), bad[None], neighbours=neighbours)
    return group.places[centres[0]], owner[0]


def merged_groups(
    frames: Float[Tensor, "t p d"],
    broken: Bool[Tensor, "t p"],
    groups: Sequence[Group],
    share: float,
    neighbours: int,
    small: int,
) -> tuple[Int[Tensor, " v"], Int[Tensor, " v"], Float[Tensor, " v"], Int[Tensor, " m"]]:
    """Each group as the means of its clusters; see `clusters_of` for the settings.

    Returns:
        For each token frame by frame its group, its output (−1: none), and its weight in it; and for each output, group
        by group and centre by centre, the token that it stands for: the centre in the first frame of its group.
    """
    shape, device = frames.shape[:2], frames.device
    group, target = (torch.full(shape, -1, device=device) for _ in range(2))
    weight, anchors, outputs = torch.zeros(shape, device=device), [], 0
    for number, own in enumerate(groups):
        centres, owner = clusters_of(own, frames, broken, share, neighbours, small)
        members = owner.clamp_min(0)
        sizes = torch.zeros(len(centres), device=device).index_add(0, members, (owner >= 0).float())
        rows = slice(own.frames.start, own.frames.stop)
        group[rows, own.places] = number
        target[rows, own.places] = torch.where(owner < 0, -1, outputs + owner)
        weight[rows, own.places] = 1 / (sizes[members] * len(own.frames))
        anchors.append(own.frames.start * shape[1] + centres)
        outputs += len(centres)
    return group.flatten(), target.flatten(), weight.flatten(), torch.cat(anchors)


def of_items(
    target: Sequence[Int[Tensor, " n"]],
    weight: Sequence[Float[Tensor, " n"]],
    anchor: Sequence[Int[Tensor, " _"]],
    *,
    ordered: bool,
) -> Reduction:
    """One map of what becomes of each item; a selection where nothing was merged.

    Args:
        target, weight: of each token its output (−1: none), and what it weighs there.
        anchor: the token that each output stands for; items may have unequal numbers.
        ordered: whether these ascend.
    """
    counts, n = tuple(map(len, anchor)), target[0].shape[0]
    representative = pad_sequence(list(anchor), batch_first=True)
    if min(counts) == n:
        return Reduction.select(representative, n, ordered=ordered)
    merged = Reduction.assign(
        torch.stack(list(target)),
        torch.stack(list(weight)),
        m=max(counts),
        representative=representative,
        ordered=ordered,
    )
    return replace(merged, counts=counts if len(set(counts)) > 1 else None)


def still_places_naive(frames: Tensor, threshold: float) -> list[bool]:
    """The same, pair by pair."""
    width, found = frames.shape[0], []
    for place in range(frames.shape[1]):
        own = frames[:, place]
        cosines = [
            float(torch.cosine_similarity(own[i], own[j], dim=0)) for i in range(width) for j in range(width) if i != j
        ]
        found.append(bool(cosines) and sum(cosines) / len(cosines) > threshold)
    return found
