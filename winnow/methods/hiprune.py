"""HiPrune (arXiv 2508.00553): keep objects and their neighbours from a middle block, global tokens from a deep one.

Looks at: attention received from all queries, in two vision blocks; needs no [CLS]. Cost: the attention of two blocks,
O(V² · D), streamed; then O(V log V).

Object block: the paper's 9th of 24 (CLIP-L, block 8 here) and 16th of 32 (Qwen2.5-VL, block 15, one with full
attention). For other towers: the block at 9/24 of the depth, `int(depth · 9/24 + 1/2) − 1`, and half of the depth where
a token is made of several patches.
Departs from the paper: the number of anchors never exceeds a fifth of the budget, so that anchors and their neighbours
always fit (for α = 0.1 this is no change).
Departs from the released code: by default neighbours are those on the grid of the tile, because the code's flat ±1 runs
over row ends and beyond the picture's ends (`wrap=True`), padding of a crop takes no part, because what is chosen of it
is lost (`padding=true`), and the remainder of an uneven split goes to the first tiles. On Qwen2.5-VL the code keeps
positions: there `hiprune:wrap=true` equals it. Elsewhere positions are kept by default, as for all methods of winnow.
"""

import torch

import winnow.contract as wn
from winnow.parts.grid import neighbours
from winnow.parts.tower import among_all_patches


@wn.register("hiprune")
class HiPrune(wn.Method):
    """Keep anchors of a middle vision block, their grid neighbours, and registers of the feature block.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        alpha: share of the budget that goes to anchors and their neighbours.
        object_layer: the vision block that finds objects; default: see above (block 8 on plain tensors).
        wrap: neighbours by flat index, the ends of the tile standing for what lies beyond them.
        padding: whether patches that unpadding removes from a tile take part; those that are kept are then lost, and
            what is left over of an uneven split is not used.
    """

    keep: wn.Budget = wn.Budget(192)
    alpha: wn.Share = 0.1
    object_layer: int | None = None
    wrap: bool = False
    padding: bool = False

    released = {"wrap": True, "padding": True, "positions": "compact"}

    def resolve(self, info: wn.ModelInfo):
        nth = info.vision_depth // 2 if info.merge > 1 else int(info.vision_depth * 9 / 24 + 0.5)
        return self if self.object_layer is not None else self.replace(object_layer=max(0, nth - 1))

    def signals(self):
        middle = 8 if self.object_layer is None else self.object_layer
        return wn.VisionAttention(middle, query="all"), wn.VisionAttention(query="all")

    def steps(self, info: wn.ModelInfo):
        return (among_all_patches(self),) if self.padding else super().steps(info)

    def reduce(self, view: wn.View) -> wn.Reduction:
        middle, deep = (wn.comparable(view[signal], view) for signal in self.signals())
        keep, tile = self.keep.of(view), wn.tile_of(view)
        if self.padding:
            keep -= keep % wn.n_tiles(view.layout)
        quota = wn.quotas(view, keep)
        anchors = torch.minimum((quota.double() * self.alpha / 5).round().long(), quota // 5)
        chosen = self._with_neighbours(wn.rank_in_tile(middle, tile) < anchors.gather(1, tile), view)
        chosen &= deep > -torch.inf  # a neighbour without a score does not count
        return wn.top_k_per_tile(deep.masked_fill(chosen, torch.inf), keep, view)

    def _with_neighbours(self, anchors: torch.Tensor, view: wn.View) -> torch.Tensor:
        near = neighbours(view.layout, view.ids.device, wrap=self.wrap)[view.ids]  # b n 4, absent ones are V
        near = torch.where(anchors[..., None], near, view.layout.n_content).flatten(1)
        found = torch.zeros(view.b, view.layout.n_content + 1, dtype=torch.bool, device=near.device)
        return found.scatter_(1, near, True).gather(1, view.ids) | anchors
