"""VisionZip (arXiv 2412.04467): keep the dominant tokens of the vision encoder, and merge the others into contextual ones.

Looks at: the [CLS] row and the keys of the feature block. Cost: O(V · C · D_head).

A tile gives D dominant tokens ([CLS] itself and the D − 1 patches that it attends to) and C contextual ones: evenly
spaced leftovers, to each of which the mean of those leftovers is added whose keys are most similar to its own. The sum
of target and mean is the released behaviour; `merge="mean"` takes the mean of the whole cluster instead.
Order: [CLS] and dominant patches of the thumbnail (or only tile), dominant patches of the other tiles row by row over
the whole mosaic, the [CLS] of these tiles, contextual tokens tile by tile. Newlines are dropped.
Departs from the paper: nothing. Departs from the released code: the budget is that of the item, split equally over its
tiles and never above its content tokens; `dominant` and `contextual` as ints are counts of one tile, as published.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.contract import (
    CLS,
    Between,
    Budget,
    Layout,
    Method,
    Reduction,
    View,
    VisionAttention,
    VisionKeys,
    WinnowError,
    comparable,
    count_broken,
    ranked,
    register,
    split_evenly,
)  # fmt: skip
from winnow.parts.cosine import product, unit


@register("visionzip")
class VisionZip(Method):
    """Keep the tokens that [CLS] attends to, and merge the rest into contextual tokens.

    Args:
        keep: all outputs of the item: dominant, [CLS] included, and contextual.
        contextual: share of them that is contextual; with `dominant`, their number in a tile.
        dominant: with `contextual`, the number in a tile, [CLS] included; then `keep` is not used.
        merge: `sum` of target and mean, or `mean` of the cluster.
    """

    keep: Budget = Budget(64)
    contextual: Annotated[float, Between(0)] = 10 / 64
    dominant: Annotated[int, Between(1)] | None = None
    merge: Literal["sum", "mean"] = "sum"
    row: VisionAttention = VisionAttention()
    keys: VisionKeys = VisionKeys()

    at = "features"
    separators = "drop"
    identity = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.contextual >= 1) if self.dominant is None else not isinstance(self.contextual, int):
            raise WinnowError(
                f"visionzip: contextual={self.contextual!r}; allowed: a number from 0 to 0.99, or together with "
                "dominant an int."
            )

    def counts(self, patches: tuple[int, ...], n_visual: int) -> tuple[tuple[int, int], ...]:
        """Dominant ([CLS] included) and contextual tokens of each tile."""
        if self.dominant is None:
            total, part = self.keep.of(n_visual), float(self.contextual)
        else:
            each = self.dominant + self.contextual
            total, part = min(n_visual, int(each) * len(patches)), self.contextual / each
        split = split_evenly(total, [p + 1 for p in patches])
        contextual = [min(max(0, n - 1), int(n * part + 0.5)) for n in split]
        return tuple((n - c, c) for n, c in zip(split, contextual, strict=True))

    def reduce(self, view: View) -> Reduction:
        tower = _tower(view.layout, view.tokens.device)
        if view.n != view.layout.n:
            raise WinnowError(
                f"visionzip needs all {view.layout.n} tokens of the tower, got {view.n}: put it first at features."
            )
        counts = self.counts(tuple(len(patches) for _, patches in tower.tiles), view.n_visual)
        scores = comparable(view[self.row], view).split([len(patches) for _, patches in tower.tiles], dim=1)
        keys, broken = unit(view[self.keys])
        count_broken(broken, view)
        cluster = torch.full((view.b, view.n), -1, device=view.tokens.device)
        dominant, targets, rows = [], [], sum(d for d, _ in counts)
        for (cls, patches), (d, c), score in zip(tower.tiles, counts, scores, strict=True):
            dominant.append(cls.expand(view.b, min(d, 1)))
            picked, rest, target, owner = zip_tile(score, [k[patches] for k in keys], max(0, d - 1), c)
            dominant.append(patches[picked])
            targets.append(patches[target])
            cluster.scatter_(1, patches[rest], torch.where(owner < 0, -1, owner + rows))
            rows += c
        first = torch.cat(dominant, 1)
        first = first.gather(1, tower.rank[first].argsort(1))
        cluster.scatter_(1, first, torch.arange(first.shape[1], device=first.device).expand_as(first))
        anchor = torch.cat([first, *targets], 1)
        return Reduction.assign(cluster, self._weights(cluster, anchor), m=rows, anchor=anchor, ordered=False)

    def _weights(self, cluster: Int[Tensor, "b n"], anchor: Int[Tensor, "b m"]) -> Float[Tensor, "b n"]:
        live = (cluster >= 0).float()
        size = live.new_zeros(anchor.shape).scatter_add_(1, cluster.clamp_min(0), live)
        if self.merge == "mean":
            return live / size.gather(1, cluster.clamp_min(0))
        others = (size - 1).clamp_min(1).gather(1, cluster.clamp_min(0))
        return (live / others).scatter_(1, anchor, 1.0)


def zip_tile(
    score: Float[Tensor, "b p"], keys: list[Float[Tensor, "p h"]], picks: int, contextual: int
) -> tuple[Int[Tensor, "b d"], Int[Tensor, "b n"], Int[Tensor, "b c"], Int[Tensor, "b n"]]:
    """One tile: patches picked by score, the others in raster order, the targets among these, and whose each other is.

    `keys` are of unit length; targets own themselves; with no contextual tokens the others belong to none (−1).
    """
    order = ranked(score)
    rest = order[:, picks:].sort(1).values
    slots = torch.arange(contextual, device=score.device) * max(1, rest.shape[1] // max(1, contextual))
    target = rest[:, slots]
    if contextual == 0:
        return order[:, :picks], rest, target, torch.full_like(rest, -1)
    owner = product(
        [k[r] for k, r in zip(keys, rest, strict=True)], [k[t] for k, t in zip(keys, target, strict=True)]
    ).argmax(2)
    owner[:, slots] = torch.arange(contextual, device=score.device)
    return order[:, :picks], rest, target, owner


class _Tower(NamedTuple):
    tiles: tuple[tuple[Int[Tensor, " 1"], Int[Tensor, " p"]], ...]  # [CLS] and patches of each tile
    rank: Int[Tensor, " n"]  # the place of each token in the order of the outputs


@lru_cache(maxsize=64)
def _tower(layout: Layout, device: torch.device) -> _Tower:
    starts = np.flatnonzero(layout.kind == CLS)
    if len(starts) == 0 or starts[0] != 0:
        raise WinnowError(
            f"visionzip needs the [CLS] token of each tile before its patches; the layout is {layout.key}."
        )
    content = layout.content
    tiles = [(a, content[(content > a) & (content < b)]) for a, b in pairwise([*starts, layout.n])]
    group = np.where(layout.kind == CLS, 2, 1)
    group[: [*starts, layout.n][1]] = 0
    grid, frame, row, col = layout.place.T
    rank = np.empty(layout.n, dtype=np.int64)
    rank[np.lexsort((col, row, frame, grid, group))] = np.arange(layout.n)
    on = lambda array: torch.as_tensor(array, device=device)  # noqa: E731
    return _Tower(tuple((on([a]), on(patches)) for a, patches in tiles), on(rank))
