"""HiPrune: keep object tokens and their neighbours from a middle vision block, and global tokens from the last one.

Source: arXiv 2508.00553. Looks at: attention received from all queries, in two vision blocks; needs no [CLS].
Cost: the attention of two blocks, O(V² · D), streamed; then O(V log V).

Object block: the paper's 9th of 24 (CLIP-L, block 8 here) and 16th of 32 (Qwen2.5-VL, block 15, one with full
attention). For other towers: the block at 9/24 of the depth, `int(depth · 9/24 + 1/2) − 1`.
Departs from the paper: the number of anchors never exceeds a fifth of the budget, so that anchors and their neighbours
always fit (for α = 0.1 this is no change).
Departs from the released code: neighbours are those on the grid of the tile; `wrap=True` brings back its flat ±1, which
runs over row ends. With tiles, the remainder of an uneven split goes to the first tiles instead of being lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.reduction import Reduction
from winnow.core.registry import register
from winnow.core.signal import VisionAttention
from winnow.core.step import Step
from winnow.core.view import View
from winnow.parts.grid import neighbours
from winnow.parts.select import comparable
from winnow.parts.settings import share, switch, whole
from winnow.parts.tiles import quotas, rank_in_tile, tile_of, top_k_per_tile


@register("hiprune", family="A", stages=("connector",), kind="training-free", arxiv="2508.00553")
@dataclass(frozen=True)
class HiPrune(Method):
    """Keep anchors of a middle vision block, their grid neighbours, and registers of the feature block.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        alpha: share of the budget that goes to anchors and their neighbours.
        object_layer: the vision block that finds objects; default: see above (block 8 on plain tensors).
        wrap: neighbours by flat index, as the released code has them.
    """

    keep: Budget = Budget(192)
    alpha: float = 0.1
    object_layer: int | None = None
    wrap: bool = False

    identity: ClassVar[dict[str, Any] | None] = {"keep": "100%"}

    def __post_init__(self) -> None:
        super().__post_init__()
        share(self, "alpha")
        switch(self, "wrap")
        if self.object_layer is not None:
            whole(self, "object_layer", self.object_layer, least=None)

    def signals(self) -> tuple[VisionAttention, ...]:
        middle = 8 if self.object_layer is None else self.object_layer
        return VisionAttention(middle, query="all"), VisionAttention(query="all")

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        middle = self.object_layer
        if middle is None:
            nth = info.vision_depth // 2 if info.family == "qwen2_5_vl" else int(info.vision_depth * 9 / 24 + 0.5)
            middle = max(0, nth - 1)
        return super(HiPrune, replace(self, object_layer=middle)).steps(info)

    def reduce(self, view: View) -> Reduction:
        middle, deep = (comparable(view[signal], view) for signal in self.signals())
        keep, tile = self.keep.of(view), tile_of(view)
        quota = quotas(view, keep)
        anchors = torch.minimum((quota * self.alpha / 5).round().long(), quota // 5)
        chosen = self._with_neighbours(rank_in_tile(middle, tile) < anchors.gather(1, tile), view)
        chosen &= deep > -torch.inf  # a neighbour without a score does not count
        return top_k_per_tile(deep.masked_fill(chosen, torch.inf), keep, view)

    def _with_neighbours(self, anchors: Bool[Tensor, "b n"], view: View) -> Bool[Tensor, "b n"]:
        near = neighbours(view.layout, view.ids.device, wrap=self.wrap)[view.ids]  # b n 4, absent ones are V
        near = torch.where(anchors[..., None], near, view.layout.n_content).flatten(1)
        found = torch.zeros(view.b, view.layout.n_content + 1, dtype=torch.bool, device=near.device)
        return found.scatter_(1, near, True).gather(1, view.ids) | anchors
