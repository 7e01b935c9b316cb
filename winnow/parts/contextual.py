"""Dominant tokens stay as they are; the others are merged into a few contextual ones (VisionZip, VisionDrop)."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.reduction import Reduction
from winnow.core.select import comparable, count_broken, ranked
from winnow.core.view import View
from winnow.parts.cosine import unit
from winnow.parts.merge import strided_clusters
from winnow.parts.tower import tower_of

Merge = Literal["sum", "mean"]


def of_tokens(view: View, score: Float[Tensor, "b n"], keys: Float[Tensor, "b n h"], d: int, c: int) -> Reduction:
    """The d best tokens in their order, then c evenly spaced ones of the rest with the means of those like them added.

    Args:
        score, keys: by which tokens are ranked, and by which they are alike.
        d, c: together at most as many as there are tokens.
    """
    best, alike = ranked(comparable(score, view)), _alike(keys, view)
    first, rest = best[:, :d].sort(1).values, best[:, d:].sort(1).values
    target, owner = strided_clusters(rest, alike, c)
    cluster = torch.full_like(view.ids, -1).scatter_(1, rest, torch.where(owner < 0, -1, owner + d))
    return _assigned(cluster, first, target, "sum")


def of_tower(
    view: View,
    method: str,
    score: Float[Tensor, "b p"],
    keys: Float[Tensor, "b n h"],
    counts: Sequence[tuple[int, int]],
    *,
    merge: Merge = "sum",
    thumbnail_first: bool = True,
) -> Reduction:
    """The same at `features` for each tile of the tower; its [CLS] is the first of its dominant tokens.

    In order: [CLS] and dominant patches of the thumbnail (or only tile), dominant patches of the other tiles row by row
    over the whole mosaic, the [CLS] of these tiles, contextual tokens tile by tile.

    Args:
        method: who asks, for messages.
        score: of the patches.
        counts: of each tile, dominant ([CLS] included) and contextual tokens.
        merge: a contextual token is the `sum` of target and mean, or the `mean` of the cluster.
        thumbnail_first: whether contextual tokens of the thumbnail stand directly behind its dominant ones instead.
    """
    tower = tower_of(view, method)
    scores, alike = comparable(score, view).split([len(p) for p in tower.patches], dim=1), _alike(keys, view)
    cluster = torch.full((view.b, view.n), -1, device=view.tokens.device)
    dominant, targets, rows = [], [], sum(d for d, _ in counts)
    for cls, patches, (d, c), own in zip(tower.cls, tower.patches, counts, scores, strict=True):
        best = ranked(own)
        rest = best[:, max(0, d - 1) :].sort(1).values
        target, owner = strided_clusters(rest, [k[patches] for k in alike], c)
        dominant += [cls.expand(view.b, min(d, 1)), patches[best[:, : max(0, d - 1)]]]
        targets.append(patches[target])
        cluster.scatter_(1, patches[rest], torch.where(owner < 0, -1, owner + rows))
        rows += c
    first = torch.cat(dominant, 1)
    first = first.gather(1, tower.rank[first].argsort(1))
    order = _thumbnail_first(counts, view.ids.device) if thumbnail_first else None
    return _assigned(cluster, first, torch.cat(targets, 1), merge, order)


def _alike(keys: Float[Tensor, "b n h"], view: View) -> list[Float[Tensor, "n h"]]:
    unit_keys, broken = unit(keys)
    count_broken(broken, view)
    return unit_keys


def _assigned(
    cluster: Int[Tensor, "b n"],
    first: Int[Tensor, "b d"],
    target: Int[Tensor, "b c"],
    merge: Merge,
    order: Int[Tensor, " m"] | None = None,
) -> Reduction:
    """The map in which `cluster` names the outputs of all but the dominant tokens, which come first."""
    cluster.scatter_(1, first, torch.arange(first.shape[1], device=first.device).expand_as(first))
    representative = torch.cat([first, target], 1)
    weights = _weights(cluster, representative, merge)
    if order is not None:
        representative, cluster = representative[:, order], torch.where(cluster < 0, -1, order.argsort()[cluster])
    m = representative.shape[1]
    return Reduction.assign(cluster, weights, m=m, representative=representative, ordered=False)


def _weights(cluster: Int[Tensor, "b n"], representative: Int[Tensor, "b m"], merge: Merge) -> Float[Tensor, "b n"]:
    live = (cluster >= 0).float()
    size = live.new_zeros(representative.shape).scatter_add_(1, cluster.clamp_min(0), live)
    if merge == "mean":
        return live / size.gather(1, cluster.clamp_min(0))
    others = (size - 1).clamp_min(1).gather(1, cluster.clamp_min(0))
    return (live / others).scatter_(1, representative, 1.0)


def _thumbnail_first(counts: Sequence[tuple[int, int]], device: torch.device) -> Int[Tensor, " m"]:
    """The outputs, dominant before contextual, with all of the first tile's ahead of the others."""
    (d, c), dominant = counts[0], sum(d for d, _ in counts)
    place = torch.arange(sum(d + c for d, c in counts), device=device)
    return torch.cat([place[:d], place[dominant : dominant + c], place[d:dominant], place[dominant + c :]])
