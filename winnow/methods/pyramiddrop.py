"""PyramidDrop (arXiv 2410.17247): cut the image tokens in steps as the LM gets deeper, by the last prompt token's look.

Looks at: one attention row of the layer that follows each cut. Cost: O(H · S · D) for each.

Departs from the paper: nothing for prefill. Its cuts after 8, 16 and 24 of 32 layers are at 1/4, 1/2 and 3/4 of any
depth; counts are shares of the item's content tokens that entered the LM, rounded down.
Departs from the released code: any padding side. Positions are kept by default, as for all methods of winnow, so that
plans differ in what they keep alone; the code numbers anew what is left after each cut (`positions=compact`).
"""

import winnow.contract as wn
from winnow.parts.cuts import check_cuts, cuts_of, equal_parts, geometric


@wn.register("pyramiddrop")
class PyramidDrop(wn.Method):
    """Keep ever fewer image tokens at three depths of the LM, by the last prompt token's attention.

    Args:
        ratios: budgets of the cuts, all of the tokens that entered the LM.
        layers: LM layers before which the cuts are made, ascending; default: equal parts of the depth.
    """

    ratios: tuple[wn.Budget, ...] = (wn.Budget(0.5), wn.Budget(0.25), wn.Budget(0.125))
    layers: tuple[wn.Layer, ...] | None = None

    rounding = "floor"
    identity = {"ratios": ("100%", "100%", "100%")}
    released = {"positions": "compact"}

    def check(self) -> None:
        check_cuts("pyramiddrop", self.layers, self.ratios, first=0)

    def at_budget(self, budget, content: int):
        """Equal steps down to the budget: at 12.5 % these are the published 50 %, 25 %, 12.5 %."""
        return self.replace(ratios=geometric(budget, content, len(self.ratios), self.rounding))

    def resolve(self, info: wn.ModelInfo):
        cuts = cuts_of(info, self.layers, equal_parts(len(self.ratios)), self.ratios, first=0)
        return self.replace(ratios=tuple(cuts.values()), layers=tuple(cuts))

    def steps(self, info: wn.ModelInfo):
        return tuple(map(self._step, map(wn.LMAttention, self.layers or ()), self.ratios))

    def _step(self, row: wn.LMAttention, budget: wn.Budget) -> wn.Step:
        return wn.Step(wn.Point("layers", row.layer), lambda view, state: self.cut(view, row, budget), (row,))

    def cut(self, view: wn.View, row: wn.LMAttention, budget: wn.Budget) -> wn.Reduction:
        """The map of the cut before the layer whose attention row is given."""
        return wn.top_k(view[row], budget.of(view.n_lm), view)
