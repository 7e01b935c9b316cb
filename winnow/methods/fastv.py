"""FastV: after K layers of the LM, drop the image tokens that the last prompt token attends to least.

Source: arXiv 2403.06764. Looks at: one attention row of LM layer K − 1. Cost: O(H · S · D) for the row; the first K
layers run in full.

Departs from the paper: nothing. `layer=0` drops at random, as the first code does, with the plan's own seed.
Departs from the released code: any batch size and any number of items; decoded tokens continue at their true positions
(the code restarts them at the short length).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.registry import register
from winnow.core.signal import LMAttention
from winnow.core.step import Step
from winnow.core.view import View
from winnow.parts.select import top_k
from winnow.parts.settings import whole


@register("fastv", family="A", stages=("decoder",), kind="training-free", arxiv="2403.06764")
@dataclass(frozen=True)
class FastV(Method):
    """After layer K, keep the image tokens that the last prompt token attends to.

    Args:
        keep: content tokens that enter layer K.
        layer: K, the layers that run in full; the step acts before LM layer K.
    """

    keep: Budget = Budget("50%")
    layer: int = 2

    identity: ClassVar[dict[str, Any] | None] = {"keep": "100%"}

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, "layer", self.layer)

    def signals(self) -> tuple[LMAttention, ...]:
        return (LMAttention(self.layer - 1, rows="last"),) if self.layer else ()

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point("layers", info.lm_layer(self.layer)), self._run, self.signals()),)

    def reduce(self, view: View) -> Reduction:
        score = view[self.signals()[0]] if self.layer else view.rand(view.n)
        return top_k(score, self.keep.of(view), view)
