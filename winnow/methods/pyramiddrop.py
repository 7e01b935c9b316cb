"""PyramidDrop: cut the image tokens in steps as the LM gets deeper, by what the last prompt token attends to.

Source: arXiv 2410.17247. Looks at: one attention row of the layer that follows each cut. Cost: O(H · S · D) for each.

Departs from the paper: nothing for prefill. Its cuts after 8, 16 and 24 of 32 layers are at 1/4, 1/2 and 3/4 of any
depth; counts are shares of the item's content tokens that entered the LM, rounded down.
Departs from the released code: any padding side; positions are kept unless the plan says `positions=compact`, which is
what the code does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.registry import register
from winnow.core.signal import LMAttention
from winnow.core.step import Reduce, State, Step
from winnow.core.view import View
from winnow.parts.select import top_k
from winnow.parts.settings import whole


@register("pyramiddrop", family="A", stages=("decoder",), kind="training-free", arxiv="2410.17247")
@dataclass(frozen=True)
class PyramidDrop(Method):
    """Keep ever fewer image tokens at three depths of the LM, by the last prompt token's attention.

    Args:
        ratios: budgets of the cuts, all of the tokens that entered the LM.
        layers: LM layers before which the cuts are made, ascending; default: equal parts of the depth.
    """

    ratios: tuple[Budget, ...] = (Budget(0.5), Budget(0.25), Budget(0.125))
    layers: tuple[int, ...] | None = None

    rounding: ClassVar[str] = "floor"
    identity: ClassVar[dict[str, Any] | None] = {"ratios": ("100%", "100%", "100%")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ratios, tuple) or not self.ratios:
            raise WinnowError(
                f"pyramiddrop: ratios={self.ratios!r}; allowed: a list of budgets, such as [50%,25%,12.5%]."
            )
        object.__setattr__(self, "ratios", tuple(r if isinstance(r, Budget) else Budget(r) for r in self.ratios))
        if self.layers is None:
            return
        if not isinstance(self.layers, tuple) or len(self.layers) != len(self.ratios):
            raise WinnowError(
                f"pyramiddrop: layers={self.layers!r}; allowed: one layer for each of {len(self.ratios)} ratios."
            )
        for layer in self.layers:
            whole(self, "layers", layer)
        if list(self.layers) != sorted(set(self.layers)):
            raise WinnowError(f"pyramiddrop: layers={self.layers!r}; allowed: ascending layers, each once.")

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        cuts = len(self.ratios)
        layers = self.layers or tuple(info.at_depth((i + 1) / (cuts + 1)) for i in range(cuts))
        budgets = dict(zip(layers, self.ratios, strict=True))  # on a very shallow LM cuts coincide: the deepest holds
        return tuple(
            Step(Point("layers", info.lm_layer(layer)), partial(self._step, layer, budget), (LMAttention(layer),))
            for layer, budget in budgets.items()
        )

    def at_budget(self, budget: Budget, content: int) -> PyramidDrop:
        """Cuts by equal factors down to the budget: at 12.5 % the published 50 %, 25 %, 12.5 %."""
        n, share = len(self.ratios), budget.share
        if share is None:
            left = budget.of(content)
            before = [str(round(content * (left / content) ** (cut / n))) for cut in range(1, n)]
        else:
            before = [f"{100 * share ** (cut / n):.8f}".rstrip("0").rstrip(".") + "%" for cut in range(1, n)]
        return replace(self, ratios=(*map(Budget, before), budget))

    def cut(self, view: View, layer: int, budget: Budget) -> Reduction:
        """The map of the cut before `layer`."""
        return top_k(view[LMAttention(layer, rows="last")], budget.rounded(self.rounding).of(view.entered), view)

    def _step(self, layer: int, budget: Budget, view: View, state: State) -> tuple[Reduce, State]:
        return Reduce(self.cut(view, layer, budget)), state
