"""VTC-CLS: keep the patches that [CLS] attends to in several vision blocks: what only a middle block sees stays.

Source: arXiv 2412.05819. Looks at: one attention row of each vision block from the middle to the feature block.
Cost: O(V · D) for each block, O(V log V) to sort.

Departs from the paper: nothing known; `start` has no published default, half of the tower's depth is taken here. With
`start` at the feature block it selects what FasterVLM selects.
Departs from the released code: any batch size, rows instead of whole attention maps, `max` and `min` beside the sum;
with tiles the budget of the item is split equally over them (the code knows single tiles only).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.reduction import Reduction
from winnow.core.registry import register
from winnow.core.signal import VisionAttention, block_index
from winnow.core.step import Step
from winnow.core.view import View
from winnow.parts.settings import one_of, whole
from winnow.parts.tiles import top_k_per_tile

_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


@register("vtc-cls", family="A", stages=("connector",), kind="training-free", arxiv="2412.05819")
@dataclass(frozen=True)
class VtcCls(Method):
    """Keep the patches that [CLS] attends to, summed over the upper vision blocks.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        start: first of the vision blocks that are read, up to the feature block; default: half of the depth.
        layers: the vision blocks themselves, instead of `start`. On plain tensors they must be named.
        combine: `sum`, `max` or `min` over the blocks.
    """

    keep: Budget = Budget(64)
    start: int | None = None
    layers: tuple[int, ...] | None = None
    combine: str = "sum"

    identity: ClassVar[dict[str, Any] | None] = {"keep": "100%"}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "combine", tuple(_COMBINE))
        if self.start is not None:
            whole(self, "start", self.start, least=None)
        if self.layers is not None:
            if self.start is not None or not isinstance(self.layers, tuple) or not self.layers:
                raise WinnowError(f"vtc-cls: layers={self.layers!r}; allowed: a list of vision blocks, without start.")
            for layer in self.layers:
                whole(self, "layers", layer, least=None)

    def signals(self) -> tuple[VisionAttention, ...]:
        return tuple(VisionAttention(layer) for layer in self.layers or ("feature",))

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        depth, tower = info.vision_depth, f"vtc-cls: the vision tower of {info.model}"
        blocks = [block_index(layer, depth, tower) for layer in self.layers or ()]
        if self.layers is None:
            last = block_index(info.feature_layer, depth, tower)
            start = min(depth // 2, last) if self.start is None else block_index(self.start, depth, tower)
            if start > last:
                raise WinnowError(f"vtc-cls: start={self.start} lies after the feature block, which is block {last}.")
            blocks = list(range(start, last + 1))
        return super(VtcCls, replace(self, start=None, layers=tuple(blocks))).steps(info)

    def reduce(self, view: View) -> Reduction:
        score, *others = [view[row] for row in self.signals()]
        for row in others:
            score = _COMBINE[self.combine](score, row)
        return top_k_per_tile(score, self.keep.of(view), view)
