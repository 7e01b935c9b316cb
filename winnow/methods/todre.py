"""ToDRE (arXiv 2505.18757): keep dissimilar tokens before the LM, and none once its text stops looking at them.

Looks at: the projected tokens, one [CLS] row of the last vision block for the first choice, and the attention between
text and image in one LM layer. Cost: O(k · V · D), or O(V² · D) with a table where V ≤ D; one layer of column sums in
the LM.

The paper's second version sums similarities; its first takes the maximum (k-center, `criterion=max`).
Departs from the paper: kept tokens stay in raster order (it does not say); the LM attention is that of the layer before
7/8 of the depth (28 of 32 layers have run; the paper's "layer 28" can be read so), and the answer covers all of an item
or nothing. Where all text follows the image, attention from image to text is 0 by causality.
Departs from the released code: no code has been released.
"""

from typing import Literal

import torch

import winnow.contract as wn
from winnow.parts.cosine import cosine_rows, unit
from winnow.parts.greedy import greedy

CLS_ROW = wn.VisionAttention(layer=-1)


@wn.register("todre")
class ToDRE(wn.Method):
    """Keep dissimilar tokens before the LM; drop all in its last layers if text ignores them.

    Args:
        keep: content tokens of the item.
        criterion: similarity to what is kept is a `sum` (v2) or a `max` (v1, k-center).
        pivot: first choice: `cls`, the token that [CLS] attends to most (of the thumbnail, where there are tiles);
            `random`; `auto` is `cls` where the tower has one.
        stage2: whether to drop all tokens at 7/8 of the LM's depth.
        tau: they are dropped where text gives the image, and the image text, less than this share of its attention.
    """

    keep: wn.Budget = wn.Budget("10%")
    criterion: Literal["sum", "max"] = "sum"
    pivot: Literal["auto", "cls", "random"] = "auto"
    stage2: bool = True
    tau: wn.Share = 0.10

    identity = {"keep": "100%", "stage2": False}

    def resolve(self, info: wn.ModelInfo):
        return self if self.pivot != "auto" else self.replace(pivot="cls" if info.has_cls else "random")

    def steps(self, info: wn.ModelInfo):
        row = () if self.pivot == "random" else (CLS_ROW,)
        first = wn.Step(wn.Point("projected"), lambda view, state: self.reduce(view), row)
        if not self.stage2 or info.depth == 1:  # with a single layer there is nothing to look at before it
            return (first,)
        layer = max(1, info.at_depth(7 / 8))
        masses = wn.LMAttentionMass(layer - 1, "question", "items"), wn.LMAttentionMass(layer - 1, "items", "question")
        return first, wn.Step(wn.Point("layers", layer), lambda view, state: self._forget(view, *masses), masses)

    def reduce(self, view: wn.View) -> wn.Reduction:
        x, broken = unit(view.tokens)
        wn.count_broken(broken, view)
        k = min(self.keep.of(view), view.n)
        picks = greedy(cosine_rows(x), self._first(view, broken), k, criterion=self.criterion, broken=broken)
        return wn.Reduction.select(picks.sort(1).values, view.n)

    def _first(self, view: wn.View, broken: torch.Tensor) -> torch.Tensor:
        if self.pivot == "random":
            score = view.rand(view.n)
        else:
            score = wn.comparable(view[CLS_ROW], view)
            lowest = torch.finfo(score.dtype).min
            score = score.clamp_min(lowest).masked_fill(~wn.in_thumbnail(view), lowest)
        return score.masked_fill(broken, -torch.inf).argmax(1, keepdim=True)

    def _forget(self, view: wn.View, *masses: wn.LMAttentionMass) -> wn.Observe | wn.Reduction:
        ignored = torch.stack([view[mass] < self.tau for mass in masses]).all(0)  # b
        gone = ignored.tolist()  # the one host read: how many tokens are left depends on the data
        if not any(gone):
            return wn.Observe()
        kept = ~ignored[:, None].expand(view.b, view.n)
        return wn.Reduction.select(kept, counts=tuple(0 if g else view.n for g in gone))
