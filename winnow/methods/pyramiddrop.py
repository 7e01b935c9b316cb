"""PyramidDrop (arXiv 2410.17247): cut the image tokens in steps as the LM gets deeper, by the last prompt token's look.

Looks at: one attention row of the layer that follows each cut. Cost: O(H · S · D) for each.

Departs from the paper: nothing for prefill. Its cuts after 8, 16 and 24 of 32 layers are at 1/4, 1/2 and 3/4 of any
depth; counts are shares of the item's content tokens that entered the LM, rounded down.
Departs from the released code: any padding side. Positions are kept by default, as for all methods of winnow, so that
plans differ in what they keep alone; the code numbers anew what is left after each cut (`positions=compact`).
"""

import winnow.contract as wn


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
        cuts, layers = len(self.ratios), self.layers
        if layers is not None and (len(layers) != cuts or list(layers) != sorted(set(layers))):
            raise wn.WinnowError(
                f"pyramiddrop: layers={layers!r}; allowed: {cuts} ascending layers, one for each ratio."
            )

    def at_budget(self, budget, content: int):
        """Equal steps down to the budget: at 12.5 % these are the published 50 %, 25 %, 12.5 %."""
        last, cuts = wn.Budget.parse(budget).rounded(self.rounding), len(self.ratios)
        parts = [float(last.share(content)) ** ((cut + 1) / cuts) for cut in range(cuts - 1)]
        least = max(1, last.of(content))
        steps = [
            max(least, round(part * content)) if last.is_count else f"{100 * max(part, 1e-6):.6g}%" for part in parts
        ]
        return self.replace(ratios=(*steps, last))

    def resolve(self, info: wn.ModelInfo):
        cuts = len(self.ratios)
        layers = self.layers or tuple(info.at_depth((i + 1) / (cuts + 1)) for i in range(cuts))
        budgets = dict(zip(layers, self.ratios, strict=True))  # on a very shallow LM cuts coincide: the deepest holds
        return PyramidDrop(tuple(budgets.values()), tuple(info.lm_layer(layer) for layer in budgets))

    def steps(self, info: wn.ModelInfo):
        return tuple(map(self._step, map(wn.LMAttention, self.layers or ()), self.ratios))

    def _step(self, row: wn.LMAttention, budget: wn.Budget) -> wn.Step:
        return wn.Step(wn.Point("layers", row.layer), lambda view, state: self.cut(view, row, budget), (row,))

    def cut(self, view: wn.View, row: wn.LMAttention, budget: wn.Budget) -> wn.Reduction:
        """The map of the cut before the layer whose attention row is given."""
        return wn.top_k(view[row], budget.of(view.n_lm), view)
