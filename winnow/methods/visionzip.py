"""VisionZip (arXiv 2412.04467): keep the dominant tokens of the vision encoder, and merge the others into a few.

Looks at: the [CLS] row and the keys of the feature block. Cost: O(V · C · D_head).

A tile gives D dominant tokens ([CLS] itself and the D − 1 patches that it attends to) and C contextual ones: evenly
spaced leftovers, to each of which the mean of those leftovers is added whose keys are most similar to its own. The sum
of target and mean is the released behaviour; `merge="mean"` takes the mean of the whole cluster instead.
Order: [CLS] and dominant patches of the thumbnail (or only tile), dominant patches of the other tiles row by row over
the whole mosaic, the [CLS] of these tiles, contextual tokens tile by tile. Newlines are dropped.
Departs from the paper: nothing.
Departs from the released code: the budget is that of the item, split equally over its tiles and never above its content
tokens; `dominant` and `contextual` as ints are counts of one tile, as published. The code puts the contextual tokens of
the thumbnail before the other tiles (`order=thumbnail`); by default all contextual tokens stand together, as for one
tile. Positions are kept by default, as for all methods of winnow; the code numbers them anew.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int

import winnow.contract as wn
from winnow.parts.cosine import unit
from winnow.parts.merge import strided_clusters
from winnow.parts.tower import tower_of


@wn.register("visionzip")
class VisionZip(wn.Method):
    """Keep the tokens that [CLS] attends to, and merge the rest into contextual tokens.

    Args:
        keep: all outputs of the item: dominant, [CLS] included, and contextual.
        contextual: share of them that is contextual (10 of 64); with `dominant`, their number in a tile.
        dominant: with `contextual`, the number in a tile, [CLS] included; then `keep` is not used.
        merge: `sum` of target and mean, or `mean` of the cluster.
        order: what comes first, all `dominant` tokens or all tokens of the `thumbnail`.
        row: the attention that ranks patches.
        keys: what contextual tokens are merged by.
    """

    keep: wn.Budget = wn.Budget(64)
    contextual: Annotated[float, wn.Between(0)] = 0.15625
    dominant: Annotated[int, wn.Between(1)] | None = None
    merge: Literal["sum", "mean"] = "sum"
    order: Literal["dominant", "thumbnail"] = "dominant"
    row: wn.VisionAttention = wn.VisionAttention()
    keys: wn.VisionKeys = wn.VisionKeys()

    at = "features"
    separators = "drop"
    identity = None
    released = {"order": "thumbnail", "positions": "compact"}

    def check(self) -> None:
        if self.contextual >= 1 if self.dominant is None else not isinstance(self.contextual, int):
            raise wn.WinnowError(f"visionzip: contextual={self.contextual!r}; allowed: below 1; with dominant an int.")

    def at_budget(self, budget, content: int):
        """Another budget at the same share of contextual tokens."""
        return self.replace(keep=budget, contextual=self._share(), dominant=None)

    def _share(self) -> float:
        """The share of contextual tokens."""
        return self.contextual if self.dominant is None else self.contextual / (self.dominant + self.contextual)

    def counts(self, patches: tuple[int, ...], n_visual: int) -> tuple[tuple[int, int], ...]:
        """Dominant ([CLS] included) and contextual tokens of each tile."""
        each = 0 if self.dominant is None else self.dominant + int(self.contextual)
        total = min(n_visual, each * len(patches)) if each else self.keep.of(n_visual)
        split = wn.split_evenly(total, [p + 1 for p in patches])
        contextual = [min(max(0, n - 1), int(n * self._share() + 0.5)) for n in split]
        return tuple((n - c, c) for n, c in zip(split, contextual, strict=True))

    def reduce(self, view: wn.View) -> wn.Reduction:
        tower = tower_of(view, "visionzip")
        sizes = [len(patches) for patches in tower.patches]
        counts = self.counts(tuple(sizes), view.n_visual)
        scores = wn.comparable(view[self.row], view).split(sizes, dim=1)
        keys, broken = unit(view[self.keys])
        wn.count_broken(broken, view)
        cluster = torch.full((view.b, view.n), -1, device=view.tokens.device)
        dominant, targets, rows = [], [], sum(d for d, _ in counts)
        for cls, patches, (d, c), score in zip(tower.cls, tower.patches, counts, scores, strict=True):
            best = wn.ranked(score)
            rest = best[:, max(0, d - 1) :].sort(1).values
            target, owner = strided_clusters(rest, [k[patches] for k in keys], c)
            dominant += [cls.expand(view.b, min(d, 1)), patches[best[:, : max(0, d - 1)]]]
            targets.append(patches[target])
            cluster.scatter_(1, patches[rest], torch.where(owner < 0, -1, owner + rows))
            rows += c
        first = torch.cat(dominant, 1)
        first = first.gather(1, tower.rank[first].argsort(1))
        cluster.scatter_(1, first, torch.arange(first.shape[1], device=first.device).expand_as(first))
        representative = torch.cat([first, *targets], 1)
        weights = self._weights(cluster, representative)
        if self.order == "thumbnail":
            order = _thumbnail_first(counts, representative)
            representative, cluster = representative[:, order], torch.where(cluster < 0, -1, order.argsort()[cluster])
        return wn.Reduction.assign(cluster, weights, m=rows, representative=representative, ordered=False)

    def _weights(
        self, cluster: Int[torch.Tensor, "b n"], representative: Int[torch.Tensor, "b m"]
    ) -> Float[torch.Tensor, "b n"]:
        live = (cluster >= 0).float()
        size = live.new_zeros(representative.shape).scatter_add_(1, cluster.clamp_min(0), live)
        if self.merge == "mean":
            return live / size.gather(1, cluster.clamp_min(0))
        others = (size - 1).clamp_min(1).gather(1, cluster.clamp_min(0))
        return (live / others).scatter_(1, representative, 1.0)


def _thumbnail_first(counts: tuple[tuple[int, int], ...], representative: torch.Tensor) -> Int[torch.Tensor, " m"]:
    """The outputs, dominant before contextual, with all of the first tile's ahead of the others."""
    (d, c), dominant = counts[0], sum(d for d, _ in counts)
    place = torch.arange(representative.shape[1], device=representative.device)
    return torch.cat([place[:d], place[dominant : dominant + c], place[d:dominant], place[dominant + c :]])
