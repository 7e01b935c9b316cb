"""FastV (arXiv 2403.06764): after K layers of the LM, drop the image tokens that the last prompt token sees least.

Looks at: one attention row of LM layer K − 1. Cost: O(H · S · D) for the row; the first K layers run in full.

Departs from the paper: nothing. `layer=0` drops at random, as the first code does, with the plan's own seed.
Departs from the released code: any batch size and any number of items; decoded tokens continue at their true positions
(the code restarts them at the short length).
"""

from winnow.contract import Budget, Layer, LMAttention, Method, ModelInfo, Point, Step, View, register


@register("fastv")
class FastV(Method):
    """After layer K, keep the image tokens that the last prompt token attends to.

    Args:
        keep: content tokens that enter layer K; halves of a token round to even, as in the code.
        layer: K, the layers that run in full; the step acts before LM layer K.
    """

    keep: Budget = Budget("50%")
    layer: Layer = 2

    rounding = "half-even"
    released = {"positions": "keep"}

    def signals(self):
        return (LMAttention(self.layer - 1),) if self.layer else ()

    def steps(self, info: ModelInfo):
        return (Step(Point("layers", info.lm_layer(self.layer)), self._one_step, self.signals()),)

    def score(self, view: View):
        return view[self.signals()[0]] if self.layer else view.rand(view.n)
