"""Cutting a video into runs of like frames: by how alike neighbours are, by density peaks, or to save the most tokens.

All forms number the segments of each video from 0, frame by frame: `[b, T]`, ascending.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.select import comparable, rank_of
from winnow.parts.cosine import unit
from winnow.parts.density_peaks import density_peaks


def neighbour_cosine(frames: Float[Tensor, "b t d"]) -> Float[Tensor, "b s"]:
    """Cosine of each frame and the one behind it, T − 1 of them; 0 beside a broken frame (NaN or infinite)."""
    x = torch.stack(unit(frames)[0])
    return (x[:, :-1] * x[:, 1:]).sum(-1)


def cut_where_unlike(alike: Float[Tensor, "b s"], threshold: float, least: int = 1) -> Int[Tensor, "b t"]:
    """Cuts between all neighbours that are less alike than a threshold, and between the least alike ones (FastVID).

    Args:
        alike: of each frame and the one behind it, T − 1 of them; NaN is the least.
        least: segments that there are at least, as far as there are frames; among equals earlier cuts are made.
    """
    score = comparable(alike)
    cut = (score < threshold) | (rank_of(-score) < least - 1)
    return torch.cat([cut.new_zeros(cut.shape[0], 1), cut], 1).long().cumsum(1)


def density_segments(frames: Float[Tensor, "b t d"], clusters: int, neighbours: int) -> Int[Tensor, "b t"]:
    """Clusters of frames by density peaks, made contiguous (PruneVid).

    A cluster keeps its longest run of frames, or its longest ones where several are equally long, and none of a single
    frame. Frames between take the cluster of the longer run beside them, the left one among equals; runs of one
    cluster that have come to touch are one. One host read.

    Args:
        clusters: of frames; at most as many as there are.
        neighbours: nearest frames by which density is measured, the frame itself among them.
    """
    clusters = max(1, min(clusters, frames.shape[1]))
    broken = ~frames.isfinite().all(-1)
    owner = density_peaks(frames, clusters, broken, neighbours=neighbours)[1]
    return torch.tensor([_contiguous(labels) for labels in owner.tolist()], device=frames.device)


def _contiguous(labels: Sequence[int]) -> list[int]:
    """Segment numbers from the clusters of frames; −1 is none."""
    runs = [[label, len(list(own))] for label, own in groupby(labels)]
    longest = {label: max(length for other, length in runs if other == label) for label in labels}
    freed: list[list[int]] = []
    for label, length in runs:
        stays = label >= 0 and length == longest[label] > 1
        freed.append([label if stays else -1, length])
    runs = _joined(freed)
    for i, run in enumerate(runs):
        if run[0] < 0:
            # What stands left of a freed run has its cluster by now, and those that have come to touch are one run.
            left, right = _length_left(runs, i), _length_right(runs, i)
            run[0] = runs[i + 1][0] if right > left else runs[i - 1][0] if left else 0
    return [number for number, (_, length) in enumerate(_joined(runs)) for _ in range(length)]


def _joined(runs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Neighbouring runs of one label as one."""
    return [[label, sum(n for _, n in own)] for label, own in groupby(runs, key=lambda run: run[0])]


def _length_left(runs: Sequence[Sequence[int]], i: int) -> int:
    length, j = 0, i - 1
    while j >= 0 and runs[j][0] == runs[i - 1][0]:
        length, j = length + runs[j][1], j - 1
    return length


def _length_right(runs: Sequence[Sequence[int]], i: int) -> int:
    return runs[i + 1][1] if i + 1 < len(runs) else 0


def most_saved(same: Bool[Tensor, "b s n"], longest: int | None = None) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
    """The segmentation that saves the most tokens, and how many it saves (HoliTom).

    A segment of w frames stores each location that never changes in it once, and so saves w − 1 tokens there. Found by
    dynamic programming over the last frame of a segment; among equals a frame stands alone, else the shorter segment
    wins. O(T · N + T²).

    Args:
        same: whether a location does not change from a frame to the one behind it, T − 1 of them.
        longest: frames of a segment at most; None: any number.
    """
    lanes, steps, _ = same.shape
    frames = steps + 1
    saved = _savings(same)
    best = torch.zeros(lanes, frames + 1, dtype=torch.int64, device=same.device)  # of the first i frames
    first = torch.arange(frames, device=same.device).repeat(lanes, 1)  # of the segment that ends at each frame
    for end in range(1, frames):
        most = min(end + 1, longest or frames)
        value = best[:, end + 1 - most : end + 1].flip(1) + saved[:, end, :most]  # of 1, 2, … frames
        # No two of them are equal once their widths are taken off.
        first[:, end] = end - (value * frames - torch.arange(most, device=same.device)).argmax(1)
        best[:, end + 1] = value.amax(1)
    begins = torch.zeros_like(first)
    at = torch.full_like(first[:, :1], steps)
    for _ in range(frames):
        start = first.gather(1, at)
        begins.scatter_(1, start, 1)
        at = (start - 1).clamp_min(0)
    return begins.cumsum(1) - 1, best[:, -1]


def _savings(same: Bool[Tensor, "b s n"]) -> Int[Tensor, "b t w"]:
    """What a segment of w + 1 frames that ends at each frame saves: w times its locations that never change."""
    lanes, steps, locations = same.shape
    held = torch.zeros(lanes, steps + 1, steps + 1, dtype=torch.int64, device=same.device)
    run = torch.zeros(lanes, locations, dtype=torch.int64, device=same.device)
    one = torch.ones_like(run)
    for step in range(steps):
        run = (run + 1) * same[:, step]
        held[:, step + 1].scatter_add_(1, run, one)
    at_least = held.flip(2).cumsum(2).flip(2)
    return at_least * torch.arange(steps + 1, device=same.device)


def ends(segment: Int[Tensor, "b t"]) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """The first and the last frame of the segment that each frame is in."""
    segment = segment.contiguous()
    return torch.searchsorted(segment, segment), torch.searchsorted(segment, segment, right=True) - 1


def cut_where_unlike_naive(alike: Sequence[float], threshold: float, least: int = 1) -> list[int]:
    """The same for one video, over lists, as are those below: what the fast forms are tested against."""
    unlike = sorted(range(len(alike)), key=lambda i: alike[i])[: least - 1]
    segment = [0]
    for i, value in enumerate(alike):
        segment.append(segment[-1] + (value < threshold or i in unlike))
    return segment


def contiguous_naive(labels: Sequence[int]) -> list[int]:
    """Segment numbers from the clusters of frames, frame by frame."""
    found, frames = list(labels), range(len(labels))

    def run(at: int) -> list[int]:
        """The frames around one that have its label now."""
        start = at
        while start > 0 and found[start - 1] == found[at]:
            start -= 1
        return [i for i in frames[start:] if all(found[j] == found[at] for j in range(start, i + 1))]

    lengths = {i: len(run(i)) for i in frames}
    freed = [
        i for i in frames if lengths[i] == 1 or any(lengths[j] > lengths[i] for j in frames if labels[j] == labels[i])
    ]
    for i in freed:
        found[i] = -1
    for i in freed:
        if found[i] >= 0:
            continue
        own = run(i)
        left = run(own[0] - 1) if own[0] > 0 else []
        right = run(own[-1] + 1) if own[-1] + 1 < len(found) else []
        label = found[right[0]] if len(right) > len(left) else found[left[0]] if left else 0
        for j in own:
            found[j] = label
    return [sum(found[j] != found[j - 1] for j in range(1, i + 1)) for i in frames]


def most_saved_naive(same: Sequence[Sequence[bool]], longest: int | None = None) -> tuple[list[int], int]:
    """Segments of most savings: of all windows that can end at a frame, the best."""
    frames = len(same) + 1
    best, windows = [0], [list[int]()]
    for end in range(frames):
        value, chosen = best[end], [*windows[end], 1]
        for width in range(2, min(end + 1, longest or frames) + 1):
            steps = same[end + 1 - width : end]
            saved = (width - 1) * sum(map(all, zip(*steps, strict=True)))
            if best[end + 1 - width] + saved > value:
                value, chosen = best[end + 1 - width] + saved, [*windows[end + 1 - width], width]
        best.append(value)
        windows.append(chosen)
    return [number for number, width in enumerate(windows[-1]) for _ in range(width)], best[-1]
