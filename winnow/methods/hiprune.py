"""HiPrune (arXiv 2508.00553): keep objects and their neighbours from a middle vision block, and global tokens from the last.

Looks at: attention received from all queries, in two vision blocks; needs no [CLS]. Cost: the attention of two blocks,
O(V² · D), streamed; then O(V log V).

Object block: the paper's 9th of 24 (CLIP-L, block 8 here) and 16th of 32 (Qwen2.5-VL, block 15, one with full
attention). For other towers: the block at 9/24 of the depth, `int(depth · 9/24 + 1/2) − 1`, and half of the depth where
a token is made of several patches.
Departs from the paper: the number of anchors never exceeds a fifth of the budget, so that anchors and their neighbours
always fit (for α = 0.1 this is no change).
Departs from the released code: neighbours are those on the grid of the tile; `wrap=True` brings back its flat ±1, which
runs over row ends. With tiles, the remainder of an uneven split goes to the first tiles instead of being lost.
"""

from dataclasses import replace

import torch

from winnow.contract import (
    Budget,
    Method,
    ModelInfo,
    Reduction,
    Share,
    View,
    VisionAttention,
    comparable,
    quotas,
    rank_in_tile,
    register,
    tile_of,
    top_k_per_tile,
)  # fmt: skip
from winnow.parts.grid import neighbours


@register("hiprune")
class HiPrune(Method):
    """Keep anchors of a middle vision block, their grid neighbours, and registers of the feature block.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        alpha: share of the budget that goes to anchors and their neighbours.
        object_layer: the vision block that finds objects; default: see above (block 8 on plain tensors).
        wrap: neighbours by flat index, as the released code has them.
    """

    keep: Budget = Budget(192)
    alpha: Share = 0.1
    object_layer: int | None = None
    wrap: bool = False

    def resolve(self, info: ModelInfo) -> "HiPrune":
        nth = info.vision_depth // 2 if info.merge > 1 else int(info.vision_depth * 9 / 24 + 0.5)
        return self if self.object_layer is not None else replace(self, object_layer=max(0, nth - 1))

    def signals(self) -> tuple[VisionAttention, ...]:
        middle = 8 if self.object_layer is None else self.object_layer
        return VisionAttention(middle, query="all"), VisionAttention(query="all")

    def reduce(self, view: View) -> Reduction:
        middle, deep = (comparable(view[signal], view) for signal in self.signals())
        keep, tile = self.keep.of(view), tile_of(view)
        quota = quotas(view, keep)
        anchors = torch.minimum((quota * self.alpha / 5).round().long(), quota // 5)
        chosen = self._with_neighbours(rank_in_tile(middle, tile) < anchors.gather(1, tile), view)
        chosen &= deep > -torch.inf  # a neighbour without a score does not count
        return top_k_per_tile(deep.masked_fill(chosen, torch.inf), keep, view)

    def _with_neighbours(self, anchors: torch.Tensor, view: View) -> torch.Tensor:
        near = neighbours(view.layout, view.ids.device, wrap=self.wrap)[view.ids]  # b n 4, absent ones are V
        near = torch.where(anchors[..., None], near, view.layout.n_content).flatten(1)
        found = torch.zeros(view.b, view.layout.n_content + 1, dtype=torch.bool, device=near.device)
        return found.scatter_(1, near, True).gather(1, view.ids) | anchors
