"""Token-level Correlation-guided Compression (arXiv 2407.14439): a crop keeps as much as it has that is not repeated.

Looks at: the keys of the feature block, and the [CLS] rows of that block and of a middle one. Cost: O(V² · d_head) for
the similarities, in strips, then O(V log V).

A token is redundant when more than a share of its crop's tokens have nearly its key. A crop keeps as many tokens as it
has others, at least one. First come those that [CLS] attends to unusually much, by the quartiles of the crop, in the
feature block (global information) or in a block at half of the depth (local information): the best of them, by the
feature block, where there are too many. The rest are those with the highest attention in the middle block.
Departs from the paper: its thresholds and the rule of its sampling are not published; these are settings, and the rest
is not sampled by default (`fill=sample` samples it in proportion to the attention of the middle block). The thumbnail
is never compressed. With `keep` the item keeps that many, in proportion to what its crops and thumbnail have.
On towers without [CLS] the attention is that received from all queries.
Departs from the released code: no code has been released.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import winnow.contract as wn
from winnow.parts.cosine import unit
from winnow.parts.per_tile import apportion, count_in_tile, quantile_in_tile

STRIP = 64  # rows of similarities at a time


@wn.register("token-correlation-compression")
class TokenCorrelationCompression(wn.Method):
    """Keep of each crop as many tokens as it has that are not repeated, the outliers of attention first.

    Args:
        keep: content tokens of the item; by default the picture decides.
        similar: cosine of two keys above which tokens are nearly the same.
        partners: share of the crop's tokens that must be nearly the same to make a token redundant.
        least: tokens that a crop keeps in any case.
        fill: what follows the outliers: the `top` of the middle block, or a `sample` by it.
        local_layer: the middle block; default: half of the depth, less one (block 11 on plain tensors).
    """

    keep: wn.Budget | None = None
    similar: Annotated[float, wn.Between(-1, 1)] = 0.9
    partners: wn.Share = 0.02
    least: Annotated[int, wn.Between(1)] = 1
    fill: Literal["top", "sample"] = "top"
    local_layer: int | None = None

    def resolve(self, info: wn.ModelInfo):
        return self if self.local_layer is not None else self.replace(local_layer=max(0, info.vision_depth // 2 - 1))

    def signals(self):
        middle = 11 if self.local_layer is None else self.local_layer
        return wn.VisionKeys(), wn.VisionAttention(query="auto"), wn.VisionAttention(middle, query="auto")

    def reduce(self, view: wn.View) -> wn.Reduction:
        keys, *rows = (view[signal] for signal in self.signals())
        deep, middle = (wn.comparable(row, view) for row in rows)
        x, broken = unit(keys)
        wn.count_broken(broken, view)
        tile, sizes = wn.tile_of(view), count_in_tile(view)
        wanted = count_in_tile(view, ~broken & ~self._redundant(x, view)).clamp_min(self.least).minimum(sizes)
        quota = wanted if self.keep is None else apportion(self.keep.of(view), wanted, sizes)
        first = torch.stack([_outliers(row, view) for row in (deep, middle)]).any(0)
        # Ranks, not values, so that outliers stand before the rest whatever the scale of either row.
        rank = torch.where(first, view.n - wn.rank_of(deep), -wn.rank_of(self._rest(middle, view))).to(torch.float64)
        missing = broken | (deep == -torch.inf) | (middle == -torch.inf)
        kept = wn.rank_in_tile(rank.masked_fill(missing, -torch.inf), tile) < quota.gather(1, tile)
        counts = None if self.keep is None else (min(self.keep.of(view), view.n),) * view.b
        return wn.Reduction.select(kept, counts=counts)

    def _redundant(self, x: list[Float[Tensor, "n h"]], view: wn.View) -> Bool[Tensor, "b n"]:
        """Which tokens of crops have many like them."""
        tile = wn.tile_of(view)
        limit = self.partners * count_in_tile(view).gather(1, tile)
        found = torch.empty_like(tile)
        for item, own, tiles in zip(x, found, tile, strict=True):
            for rows, out, at in zip(item.split(STRIP), own.split(STRIP), tiles.split(STRIP), strict=True):
                alike = (rows @ item.T > self.similar) & (at[:, None] == tiles)
                torch.sum(alike, 1, out=out)
        thumbnail = wn.in_thumbnail(view)
        return (found - 1 > limit) & ~(thumbnail & ~thumbnail.all(1, keepdim=True))

    def _rest(self, middle: Float[Tensor, "b n"], view: wn.View) -> Float[Tensor, "b n"]:
        """By what the tokens that are no outliers are ranked; a sample without replacement by Gumbel's trick."""
        if self.fill == "top":
            return middle
        tiny = torch.finfo(middle.dtype).tiny
        return middle.clamp_min(tiny).log() - (-view.rand(view.n).to(middle.dtype).clamp_min(tiny).log()).log()


def _outliers(row: Float[Tensor, "b n"], view: wn.View) -> Bool[Tensor, "b n"]:
    """Values beyond the upper fence of Tukey's boxplot, tile by tile."""
    low, high = (quantile_in_tile(row, q, view) for q in (0.25, 0.75))
    return row > (high + 1.5 * (high - low)).gather(1, wn.tile_of(view))
