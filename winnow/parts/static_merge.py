"""Shortening the windows of a video: places that stay the same become one frame and are merged, the others are chosen.

HoliTom's. A window's static places are averaged over time, and of these means density peaks merge as many as are to go;
of the others each frame keeps those with the highest scores. Slots are frame · places + place.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from math import ceil
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from winnow.core.reduction import Reduction
from winnow.core.select import ranked
from winnow.parts.density_peaks import density_peaks


class Group(NamedTuple):
    """Tokens that are shortened together: the static places of a window, or the other places of one of its frames."""

    frames: range
    places: Int[Tensor, " k"]
    static: bool


class Shortened(NamedTuple):
    """What becomes of the tokens of a group, or of all.

    Attributes:
        slot: of each token that feeds an output.
        output: which one it feeds, from 0.
        weight: with which it does.
        representative: the slot that stands for each output: of a static one, that in the first frame of its window.
    """

    slot: Int[Tensor, " e"]
    output: Int[Tensor, " e"]
    weight: Float[Tensor, " e"]
    representative: Int[Tensor, " m"]


def unchanged(
    x: Sequence[Float[Tensor, "n d"]], at: Int[Tensor, "b n"], frames: int, tau: float, broken: Bool[Tensor, "b n"]
) -> Bool[Tensor, "b s p"]:
    """Whether the token at a place of a frame and the one in the next frame have a cosine above tau; broken ones: no.

    Args:
        x: tokens of each video, of unit length.
        at: the token of each slot.
    """
    videos = [own[i].unflatten(0, (frames, -1)) for own, i in zip(x, at, strict=True)]
    sound = ~broken.gather(1, at).unflatten(1, (frames, -1))
    alike = torch.stack([(video[:-1] * video[1:]).sum(-1) for video in videos])
    return (alike > tau) & sound[:, 1:] & sound[:, :-1]


def groups_of(same: Bool[Tensor, "s p"], segment: Sequence[int]) -> list[Group]:
    """The groups of a video: of each window its static places, if there are any, then its frames. Two host reads each.

    Args:
        same: whether a place does not change from a frame to the one behind it, T − 1 of them.
        segment: the window of each frame, ascending.
    """
    found: list[Group] = []
    for _, own in groupby(range(len(segment)), key=segment.__getitem__):
        frames = list(own)
        span = range(frames[0], frames[-1] + 1)
        held = same[span.start : span.stop - 1].all(0) & (len(span) > 1)
        static, others = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
        found += [Group(span, static, True)] if len(static) else []
        found += [Group(range(frame, frame + 1), others, False) for frame in span]
    return found


def in_total(groups: Sequence[Group], keep: int) -> list[int]:
    """Outputs of each group, in proportion, so that their sum is a number, or all that there are."""
    sizes = [len(group.places) for group in groups]
    keep = min(keep, sum(sizes))
    return [b - a for a, b in pairwise(keep * n // sum(sizes) for n in accumulate(sizes, initial=0))]


def each_rounded(groups: Sequence[Group], share: float, total: int) -> list[int]:
    """Outputs of each group, each rounded by itself: static ones to the nearest, those of frames up.

    Args:
        share: of all tokens of the video, so that more than that is kept of the groups.
        total: these tokens.
    """
    # The quotients are those of the authors' code, so that they round alike.
    ratio = min(1.0, share / (sum(len(group.places) for group in groups) / total))
    return [(round if group.static else ceil)(len(group.places) * ratio) for group in groups]


def shortened(
    groups: Sequence[Group],
    counts: Sequence[int],
    x: Float[Tensor, "t p d"],
    score: Float[Tensor, "t p"],
    near: int,
    centre: float | None,
) -> Shortened:
    """All groups of a video, one behind the other.

    Args:
        counts: outputs of each group.
        score: by which dynamic tokens are ranked; comparable.
        near: nearest tokens by which density is measured, at most as many as there are outputs.
        centre: what a density peak counts beside the mean of the others of its cluster; None: as much as each of them.
    """
    parts = [
        _merged(group, count, x, near, centre) if group.static else _chosen(group, count, score)
        for group, count in zip(groups, counts, strict=True)
    ]
    starts = list(accumulate(counts, initial=0))[:-1]
    outputs = torch.cat([part.output + start for part, start in zip(parts, starts, strict=True)])
    slot, weight, representative = (torch.cat([part[i] for part in parts]) for i in (0, 2, 3))
    return Shortened(slot, outputs, weight, representative)


def _chosen(group: Group, count: int, score: Float[Tensor, "t p"]) -> Shortened:
    best = ranked(score[group.frames.start, group.places][None])[0, :count].sort().values
    slot = group.frames.start * score.shape[1] + group.places[best]
    return Shortened(slot, torch.arange(len(slot), device=slot.device), torch.ones_like(slot, dtype=score.dtype), slot)


def _merged(group: Group, count: int, x: Float[Tensor, "t p d"], near: int, centre: float | None) -> Shortened:
    window = x[group.frames.start : group.frames.stop, group.places]
    means = window.to(torch.promote_types(x.dtype, torch.float32)).mean(0)
    if count == 0:
        none = group.places[:0]
        return Shortened(none, none, means[:0, 0], none)
    peaks, owner = (found[0] for found in density_peaks(means[None], count, neighbours=min(near, count)))
    peaks, order = peaks.sort()
    owner = order.argsort()[owner]
    size = means.new_zeros(count).scatter_add_(0, owner, torch.ones_like(means[:, 0]))
    if centre is None:
        weight = 1 / size[owner]
    else:
        weight = (1 - centre) / (size - 1).clamp_min(1)[owner]
        weight[peaks] = torch.where(size > 1, centre, 1.0).to(weight.dtype)
    many, first = len(group.frames), group.frames.start * x.shape[1]
    frames = torch.arange(group.frames.start, group.frames.stop, device=x.device)
    slot = (frames[:, None] * x.shape[1] + group.places).flatten()
    return Shortened(slot, owner.repeat(many), weight.repeat(many) / many, first + group.places[peaks])


def stacked(videos: Sequence[Shortened], at: Int[Tensor, "b n"], in_order: bool) -> Reduction:
    """One map of all videos, which may have unequal numbers of outputs.

    Args:
        at: the token of each slot.
        in_order: whether outputs stand in the order of the tokens that stand for them, or in their own.
    """
    counts = tuple(len(video.representative) for video in videos)
    standing = [own[video.representative] for own, video in zip(at, videos, strict=True)]
    orders = [tokens.argsort() if in_order else torch.arange(len(tokens), device=at.device) for tokens in standing]
    representative = pad_sequence([t[o] for t, o in zip(standing, orders, strict=True)], batch_first=True)
    ragged = counts if len(set(counts)) > 1 else None
    if all(len(video.slot) == len(video.representative) for video in videos):  # nothing was merged
        return Reduction(at.shape[1], max(counts), representative, counts=ragged, ordered=in_order)
    cluster = torch.full_like(at, -1)
    weight = torch.zeros_like(at, dtype=videos[0].weight.dtype)
    for lane, (video, order) in enumerate(zip(videos, orders, strict=True)):
        fed = at[lane, video.slot]
        cluster[lane, fed], weight[lane, fed] = order.argsort()[video.output], video.weight
    index = torch.arange(at.shape[1], device=at.device).expand_as(at)
    return Reduction(
        at.shape[1], max(counts), index, cluster, weight, counts=ragged, representative=representative, ordered=in_order
    )
