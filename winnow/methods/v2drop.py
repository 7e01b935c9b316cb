"""V2Drop (arXiv 2509.01552): in the LM, drop the image tokens that the last layer has changed least.

Looks at: what goes into one LM layer before each cut and what comes out, no attention. Cost: O(N · D) for each cut.

Variation: the Euclidean norm of the difference between a token's hidden states behind and before a layer. Tokens that
vary little are taken to have little influence on the answer; the score knows no positions and asks no question. As
published, LLaVA-1.5 (32 layers, 576 tokens) is cut before layers 3, 17 and 22: half of the tokens, half of those, and
all but one.
Departs from the paper: on other depths the cuts are at the same shares of the depth. All shares are of the tokens that
entered the LM (a quarter, where the paper keeps half of a half).
Departs from the released code: any number and size of pictures (there, 576 tokens behind 35 tokens of text), and any
batch size (there, the first sample decides for all). Its version for Qwen2-VL has other numbers (28 layers: before 3,
16 and 22 a quarter, 5 % of those, one: `ratios=[25%,1.25%,1],layers=[3,16,22]`).
"""

import torch

import winnow.contract as wn
from winnow.parts.cuts import check_cuts, cuts_of, geometric

DEPTHS = (3 / 32, 17 / 32, 22 / 32)


@wn.register("v2drop")
class V2Drop(wn.Method):
    """Keep ever fewer image tokens at three depths of the LM: those that a layer has changed most.

    Args:
        ratios: budgets of the cuts, all of the tokens that entered the LM.
        layers: LM layers before which the cuts are made, ascending; default: at the published shares of the depth.
    """

    ratios: tuple[wn.Budget, ...] = (wn.Budget(0.5), wn.Budget(0.25), wn.Budget(1))
    layers: tuple[wn.Layer, ...] | None = None

    rounding = "floor"
    identity = {"ratios": ("100%", "100%", "100%")}
    released = {"positions": "keep"}

    def check(self) -> None:
        check_cuts("v2drop", self.layers, self.ratios, len(DEPTHS))

    def at_budget(self, budget, content: int):
        """Equal steps down to the budget."""
        return self.replace(ratios=geometric(budget, content, len(self.ratios), self.rounding))

    def resolve(self, info: wn.ModelInfo):
        cuts = cuts_of(info, self.layers, DEPTHS, self.ratios)
        return self.replace(ratios=tuple(cuts.values()), layers=tuple(cuts))

    def steps(self, info: wn.ModelInfo):
        return tuple(map(self._step, self.layers or (), self.ratios))

    def _step(self, layer: int, budget: wn.Budget) -> wn.Step:
        change = wn.LayerChange(layer - 1)
        return wn.Step(wn.Point("layers", layer), lambda view, state: self.cut(view, change, budget), (change,))

    def cut(self, view: wn.View, change: wn.LayerChange, budget: wn.Budget) -> wn.Reduction:
        """The map of the cut behind the layer whose change is given."""
        varied = view[change]
        varied = varied.masked_fill(varied.isinf(), torch.nan)  # an overflow is no variation
        return wn.top_k(varied, budget.of(view.n_lm), view)
