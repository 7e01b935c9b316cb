"""VisPruner (arXiv 2412.01818): keep what [CLS] attends to, and of the rest the tokens that have no duplicates.

The second version of FasterVLM's paper.

Looks at: one attention row of the feature block, and the tower's features. Cost: O(V² · C) for one V × V table, then
(V − k)/8 rounds that read half of what is left of it.

A share `important` of a tile's T tokens, rounded down, are those with the highest attention (all of them: FasterVLM).
The others are what is left of the rest, in descending attention, when duplicates are dropped in rounds of at most 8:
the even places of the list are compared with the odd places by cosine, and those go that are most like one of them;
then the list is the rest of the even places by descending likeness, and behind it the odd places.
Departs from the paper: on towers without [CLS] a token's score is the attention that it receives from all queries;
where several patches make a token, tokens are compared as the LM is given them (`by=projected`).
Departs from the released code: a list of odd length, or one shorter than a round needs, ends with an index error
there (291 of the 576 budgets of a LLaVA-1.5 at a share of one half) or, rarely, with a token less; here the even places
may be one more, and a round drops no more than there are. `keep` is for the whole item, and newlines stay. By default
padding of a crop takes no part, because what is chosen of it is lost (`padding=true`), and positions are not numbered
anew.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int

import winnow.contract as wn
from winnow.parts.apart import tiles_apart
from winnow.parts.cosine import unit
from winnow.parts.duplicates import without_duplicates
from winnow.parts.tower import among_all_patches

FEATURES = wn.VisionFeatures()


@wn.register("vispruner")
class VisPruner(wn.Method):
    """Keep the patches that [CLS] attends to, and of the others those that have no duplicates.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        important: share of them that is chosen by attention.
        row: the attention that ranks them.
        by: what duplicates are found by: the tokens as the `tower` gives them, or as the LM is given them
            (`projected`); `auto` is `tower` where each patch is a token. On plain tensors: the view's tokens.
        padding: whether patches that unpadding removes from a tile take part; those that are kept are then lost.
    """

    keep: wn.Budget = wn.Budget(128)
    important: wn.Share = 0.5
    row: wn.VisionAttention = wn.VisionAttention(query="auto")
    by: Literal["auto", "tower", "projected"] = "auto"
    padding: bool = False

    pairwise = True
    released = {"row": wn.VisionAttention(), "padding": True, "positions": "compact"}

    def resolve(self, info: wn.ModelInfo):
        own = super().resolve(info)
        return own if self.by != "auto" else own.replace(by="tower" if info.merge == 1 else "projected")

    def signals(self):
        # At `features`, where padding can be seen, the tokens are what the tower gives.
        return (self.row,) if self.padding or self.by == "projected" else (self.row, FEATURES)

    def steps(self, info: wn.ModelInfo):
        return (among_all_patches(self),) if self.padding else super().steps(info)

    def reduce(self, view: wn.View) -> wn.Reduction:
        x, broken = unit(view[FEATURES] if FEATURES in view.signals else view.tokens)
        wn.count_broken(broken, view)
        score = wn.comparable(view[self.row], view).masked_fill(broken, -torch.inf)
        keep = min(self.keep.of(view), view.n)
        kept = torch.zeros_like(broken)
        for lane, members, k in tiles_apart(view, keep):
            own = score[lane][:, members]
            chosen = self._of_tile(own, [item[members] for item in x[lane]], k)
            kept[lane] = kept[lane].scatter(1, members[chosen], True)
        return wn.Reduction.select(kept, counts=(keep,) * view.b)

    def _of_tile(
        self, score: Float[torch.Tensor, "b n"], x: list[Float[torch.Tensor, "n d"]], k: int
    ) -> Int[torch.Tensor, "b k"]:
        order, first = wn.ranked(score), int(k * self.important)
        broken = score == -torch.inf
        kept = torch.zeros_like(broken).scatter_(1, order[:, :first], True)
        if k > first:
            kept.scatter_(1, without_duplicates(x, order[:, first:], k - first, broken), True)
        # Where a broken token is left although others were dropped, the best of those take its place.
        return wn.ranked(score.clamp_max(torch.finfo(score.dtype).max).masked_fill(kept & ~broken, torch.inf))[:, :k]
