"""VTC-CLS (arXiv 2412.05819): keep the patches that [CLS] attends to in several vision blocks, from the middle on.

Looks at: one attention row of each vision block from the middle to the feature block. Cost: O(V · D) for each block,
O(V log V) to sort.

Departs from the paper: nothing known; `start` has no published default, half of the tower's depth is taken here. With
`start` at the feature block it selects what FasterVLM selects.
Departs from the released code: any batch size, rows instead of whole attention maps, `max` and `min` beside the sum;
with tiles the budget of the item is split equally over them (the code knows single tiles only). Positions are kept by
default, as for all methods of winnow; the code numbers them anew.
"""

from functools import reduce
from typing import Literal

import torch

from winnow.contract import Budget, Method, ModelInfo, View, VisionAttention, WinnowError, register

_COMBINE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


@register("vtc-cls")
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
    combine: Literal["sum", "max", "min"] = "sum"

    per_tile = True
    released = {"combine": "sum", "positions": "compact"}

    def check(self) -> None:
        if self.layers is not None and self.start is not None:
            raise WinnowError(f"vtc-cls: layers={self.layers!r}; allowed: a list of vision blocks, without start.")

    def resolve(self, info: ModelInfo):
        if self.layers is not None:
            return self.replace(layers=tuple(VisionAttention(layer).block(info) for layer in self.layers))
        last = VisionAttention().block(info)
        start = min(info.vision_depth // 2, last) if self.start is None else VisionAttention(self.start).block(info)
        if start > last:
            raise WinnowError(f"vtc-cls: start={self.start} lies after the feature block, which is block {last}.")
        return self.replace(start=None, layers=tuple(range(start, last + 1)))

    def signals(self):
        return tuple(VisionAttention(layer) for layer in self.layers or ("feature",))  # type: ignore[arg-type]

    def score(self, view: View):
        return reduce(_COMBINE[self.combine], (view[row] for row in self.signals()))  # type: ignore[call-overload]
