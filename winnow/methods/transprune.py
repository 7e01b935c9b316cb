"""TransPrune (arXiv 2507.20630): cut the image tokens that LM layers move least and the instruction looks at least.

Looks at: what goes into and comes out of the attention and the MLP of a few LM layers, and the attention rows of the
text behind the image in the layer that follows each cut. Cost: O(N · D) for each layer, O(H · T · S · D) for the rows.

A layer moves a token by |o| / |u| × softmax(1 − cos(u, o)), once for each of its modules: u is the module's input
behind the norm, o its output before that is added, and the softmax is over the sequence. Movements are summed over the
layers so far. They and the attention are each scaled to sum to one over the image, and added.
As published, LLaVA's 32 layers are cut before layers 7, 9 and 12 (from 0), and movements are summed from layer 6 on.
Departs from the paper: on other depths the cuts are at the same shares of the depth, and sums begin one layer earlier.
Departs from the released code: any batch size and number of pictures; its softmax runs over the batch as well. The
words that a chat template puts behind the question do not look (`suffix=true`, where the template is known). Positions
are kept by default, as for all methods of winnow; the code numbers anew what is left after each cut.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float

import winnow.contract as wn
from winnow.parts.cuts import check_cuts, cuts_of, stretched

DEPTHS = (7 / 32, 9 / 32, 12 / 32)


@wn.register("transprune")
class TransPrune(wn.Method):
    """Keep ever fewer image tokens at three depths of the LM: those that layers move and the text looks at.

    Args:
        ratios: budgets of the cuts, all of the tokens that entered the LM.
        layers: LM layers before which the cuts are made, ascending; default: at the published shares of the depth.
        start: the first layer whose movements count; default: the one before the first cut.
        attention: whether the text's attention counts; without it no attention is computed.
        suffix: whether the words behind the question look as well.
    """

    ratios: tuple[wn.Budget, ...] = (wn.Budget("87.5%"), wn.Budget("62.5%"), wn.Budget("12.5%"))
    layers: tuple[wn.Layer, ...] | None = None
    start: wn.Layer | None = None
    attention: bool = True
    suffix: bool = False

    rounding = "floor"
    identity = {"ratios": ("100%", "100%", "100%")}
    released = {"suffix": True, "positions": "compact"}

    def check(self) -> None:
        check_cuts("transprune", self.layers, self.ratios, len(DEPTHS))

    def at_budget(self, budget, content: int):
        """The published steps, stretched or squeezed to end at the budget."""
        return self.replace(ratios=stretched(budget, content, self.ratios))

    def resolve(self, info: wn.ModelInfo):
        cuts = cuts_of(info, self.layers, DEPTHS, self.ratios)
        first = min(cuts)
        start = first - 1 if self.start is None else self.start
        if start >= first:
            raise wn.WinnowError(f"transprune: start={start}; allowed: a layer before {first}, that of the first cut.")
        return self.replace(ratios=tuple(cuts.values()), layers=tuple(cuts), start=start)

    def steps(self, info: wn.ModelInfo):
        return tuple(map(self._step, self.layers or (), self.ratios))

    def _step(self, layer: int, budget: wn.Budget) -> wn.Step:
        moved = tuple(map(wn.TokenTransition, range(self.start or 0, layer)))
        words = wn.WordAttention(layer, "all") if self.suffix else wn.LMAttention(layer, "question")
        looks = (words,) if self.attention else ()
        return wn.Step(
            wn.Point("layers", layer), lambda view, state: self.cut(view, moved, looks, budget), (*moved, *looks)
        )

    def cut(
        self, view: wn.View, moved: Sequence[wn.Signal], looks: Sequence[wn.Signal], budget: wn.Budget
    ) -> wn.Reduction:
        """The map of a cut, from the movements by each layer so far and, where it counts, the text's attention."""
        score = _share(torch.stack([_wide(view[layer]) for layer in moved]).sum(0))
        for words in looks:
            seen = _wide(view[words])
            score = score + _share(seen.sum(-1) if seen.ndim > 2 else seen)
        return wn.top_k(score, budget.of(view.n_lm), view)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _share(x: Float[torch.Tensor, "b n"]) -> Float[torch.Tensor, "b n"]:
    """Values that sum to one over the tokens; those that are not finite are NaN."""
    x = x.masked_fill(~x.isfinite(), torch.nan).contiguous()
    return x / (x.nansum(1, keepdim=True) + 1e-8)
