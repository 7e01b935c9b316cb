"""FitPrune (arXiv 2409.10197): drop image tokens behind most layers of the LM, as many as a recipe says for each.

Looks at: what image and text attend to in each LM layer behind which tokens leave. Cost: for each, the attention
weights of all rows from the first image token on once again, O(H · S² · D), in tiles.

A token's score is the product of what it gets from all image tokens and what it gets from all text behind the image,
each the sum over rows of the largest of the heads. A recipe says how many tokens each layer drops. It was fitted on a
few samples so that both distributions of attention lose as little as they can at a given saving of FLOPs; those here
are the authors', for LLaVA-1.5-7B with 576 tokens and LLaVA-NeXT with 2,880. `drops` takes one that was fitted
elsewhere. Other numbers of tokens lose the same shares, each layer's rounded down.
Departs from the paper: recipes are not fitted here; on other depths a cut drops what the layers of its share of the
depth did. With `left`, a recipe is stretched to end at a budget.
Departs from the released code: any number and size of pictures and any batch size; newlines are no image tokens.
Tokens leave behind a layer instead of between its attention and its MLP, which changes nothing for the others. For
LLaVA-NeXT: `fitted=2880`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float

import winnow.contract as wn
from winnow.parts.recipes import RECIPES, Recipe


@dataclass(frozen=True)
class LargestHeads(wn.LMSignal):
    """Attention that each token gets from all items, times what it gets from the text behind them: `[b, N]`, fp32.

    Both are sums over rows of the largest of the heads. Without text behind the items, the first alone.
    """

    def read(self, seen: wn.LMAttentionInputs) -> Float[torch.Tensor, "b p"]:
        logical, real = seen.packing.to_logical(), seen.packing.real
        wide = torch.promote_types(seen.q.dtype, torch.float32)
        found = torch.zeros(*seen.packing.source.shape, dtype=wide, device=seen.q.device)
        for b, (items, end) in enumerate(zip(seen.spans.items, seen.spans.ends, strict=True)):
            if items.shape[0]:
                image = _received(seen, b, items, torch.ones_like(items, dtype=torch.bool))
                text = _received(seen, b, logical[b, end:], real[b, end:])
                found[b] = image * torch.where(real[b, end:].any(), text, 1)
        return found


def _received(seen: wn.LMAttentionInputs, b: int, slots: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The attention of some slots of a sample: over heads the largest, over slots the sum."""
    total = torch.zeros(
        seen.packing.width, dtype=torch.promote_types(seen.q.dtype, torch.float32), device=seen.q.device
    )
    for at, rows in seen.by_head(b, slots):
        total += rows.amax(0)[:, seen.before :].masked_fill(~real[at, None], 0).sum(0)
    return total


@wn.register("fitprune")
class FitPrune(wn.Method):
    """Drop image tokens behind most layers of the LM, by a fitted recipe and the attention of image and text.

    Args:
        reduction: the percentage of FLOPs that the recipe was fitted to save.
        fitted: the tokens of the pictures that it was fitted on; on 2880 there are recipes for 40 and 60.
        drops: a recipe in the place of those: how many tokens of `fitted` each LM layer drops.
        left: content tokens at last, of those that entered the LM; default: what the recipe leaves.
    """

    reduction: Literal[10, 20, 30, 40, 50, 55, 60, 70, 80, 90] = 60
    fitted: Literal[576, 2880] = 576
    drops: tuple[wn.Count, ...] | None = None
    left: wn.Budget | None = None

    rounding = "floor"
    identity = {"left": "100%"}
    released = {"positions": "keep"}

    def check(self) -> None:
        had = tuple(RECIPES[self.fitted])
        if self.reduction not in had:
            raise wn.WinnowError(f"fitprune: reduction={self.reduction}; allowed with fitted={self.fitted}: {had}.")

    def at_budget(self, budget, content: int):
        """The recipe that ends nearest to the budget, stretched to end there."""
        left = wn.Budget.parse(budget).rounded(self.rounding)
        known = RECIPES[self.fitted]
        nearest = min(known, key=lambda saved: abs(known[saved].ends_at - float(left.share(content))))
        return self.replace(reduction=nearest, left=left)

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.fitted, self.drops) if self.drops else RECIPES[self.fitted][self.reduction]

    def steps(self, info: wn.ModelInfo):
        cuts = self.recipe.cuts(info.depth)
        return tuple(self._step(layer, done, max(cuts.values())) for layer, done in cuts.items())

    def _step(self, layer: int, done: int, last: int) -> wn.Step:
        heads = LargestHeads(layer - 1)

        def run(view: wn.View, state: wn.State) -> wn.Reduction:
            return self.cut(view, heads, self.kept(view.n_lm, done, last))

        return wn.Step(wn.Point("layers", layer), run, (heads,))

    def kept(self, n: int, done: int, last: int) -> int:
        """What is left of n tokens when so many layers of the recipe are done, of those that will be."""
        if self.left is None:
            return max(1, self.recipe.left(n, done))
        return self.recipe.stretched(n, done, last, self.left.of(n))

    def cut(self, view: wn.View, heads: LargestHeads, count: int) -> wn.Reduction:
        """The map of the cut behind the layer whose attention is given."""
        return wn.top_k(view[heads], count, view)
