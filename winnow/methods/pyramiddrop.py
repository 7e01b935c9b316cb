"""PyramidDrop (arXiv 2410.17247): cut the image tokens in steps as the LM gets deeper, by the last prompt token's look.

Looks at: one attention row of the layer that follows each cut. Cost: O(H · S · D) for each.

Departs from the paper: nothing for prefill. Its cuts after 8, 16 and 24 of 32 layers are at 1/4, 1/2 and 3/4 of any
depth; counts are shares of the item's content tokens that entered the LM, rounded down.
Departs from the released code: any padding side; positions are kept unless the plan says `positions=compact`, which is
what the code does.
"""

from fractions import Fraction

from winnow.contract import (
    Budget,
    Layer,
    LMAttention,
    Method,
    ModelInfo,
    Point,
    Reduction,
    Step,
    View,
    WinnowError,
    register,
    top_k,
)  # fmt: skip


@register("pyramiddrop")
class PyramidDrop(Method):
    """Keep ever fewer image tokens at three depths of the LM, by the last prompt token's attention.

    Args:
        ratios: budgets of the cuts, all of the tokens that entered the LM.
        layers: LM layers before which the cuts are made, ascending; default: equal parts of the depth.
    """

    ratios: tuple[Budget, ...] = (Budget(0.5), Budget(0.25), Budget(0.125))
    layers: tuple[Layer, ...] | None = None

    rounding = "floor"
    identity = {"ratios": ("100%", "100%", "100%")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and (
            len(self.layers) != len(self.ratios) or list(self.layers) != sorted(set(self.layers))
        ):
            raise WinnowError(
                f"pyramiddrop: layers={self.layers!r}; allowed: ascending layers, one for each of {len(self.ratios)} "
                "ratios."
            )

    def at_budget(self, budget: Budget | int | float | str, content: int) -> "PyramidDrop":
        """Equal steps down to the budget: at 12.5 % these are the published 50 %, 25 %, 12.5 %."""
        least = budget if isinstance(budget, Budget) else Budget(budget)
        share, cuts = Fraction(least.of(content), content), len(self.ratios)
        steps = [float(share) ** ((cut + 1) / cuts) for cut in range(cuts - 1)]
        return PyramidDrop((*(Budget(max(least.of(content), round(s * content))) for s in steps), least), self.layers)

    def resolve(self, info: ModelInfo) -> "PyramidDrop":
        cuts = len(self.ratios)
        layers = self.layers or tuple(info.at_depth((i + 1) / (cuts + 1)) for i in range(cuts))
        budgets = dict(zip(layers, self.ratios, strict=True))  # on a very shallow LM cuts coincide: the deepest holds
        return PyramidDrop(tuple(budgets.values()), tuple(info.lm_layer(layer) for layer in budgets))

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return tuple(
            Step(
                Point("layers", row.layer),
                lambda view, state, row=row, budget=budget: self.cut(view, row, budget),
                (row,),
            )
            for row, budget in zip(map(LMAttention, self.layers or ()), self.ratios, strict=True)
        )

    def cut(self, view: View, row: LMAttention, budget: Budget) -> Reduction:
        """The map of the cut before the layer whose attention row is given."""
        return top_k(view[row], budget.of(view.n_lm), view)
