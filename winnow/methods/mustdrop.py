"""MustDrop (arXiv 2411.10803): merge flat windows early in the encoder, then drop in the LM what its text ignores.

Looks at: the tokens behind the first vision block; one [CLS] row of the last one (all queries where there is no [CLS]);
the attention of m text tokens to the image in four LM layers. Cost: O(V · C), O(m · S · D) each; counts are host reads.

Behind block 0, each full window of 3 × 3 patches whose mean cosine over its pairs is at least `flat` becomes its mean.
The share `key` of what is left that [CLS] of the last block sees most is never dropped. Behind LM layers 2, 6, 10 and
14 of 32 (the same shares of any depth) a token goes where the text gives it less than the share `overall` of what it
gives all, and no text token as much as `individual`. Then the caches of layers 2 to 14 are cut to what is left, too.
Departs from the paper: with `budget` (for tables) the cuts keep counts, in equal steps.
Departs from the released code: tiles merge their own numbers of windows, not the fewest of a batch (`equal=true`). A
merged token stands in the middle of its window; in the code they come first, the flattest ahead, without newlines
(`order=merged`). Positions are kept; the code numbers them anew, and decodes from cut caches at positions before the
prompt's end, which is not reproduced. The defaults are those of its scripts for 128 tokens.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import torch

import winnow.contract as wn
from winnow.parts.cosine import unit
from winnow.parts.windows import full_windows, means

SIDE = 3


@wn.register("mustdrop")
class MustDrop(wn.Method):
    """Merge flat windows, keep what [CLS] sees, and drop what all of the text ignores.

    Args:
        flat: mean cosine from which on a window is merged; above 1: none is.
        key: share of each tile's tokens that is never dropped.
        overall: a token is dropped that gets less than this share of the text's attention to the image,
        individual: and less than this from each token of the text.
        layers: LM layers behind which tokens are dropped, ascending; default: see above.
        budget: tokens of the item that the last cut leaves, instead of the two shares.
        equal: whether all tiles of a call merge as many windows as the one with the fewest.
        order: of the tokens in the LM: `raster`, or `merged` ones first.
        row: the attention by which key tokens are found.
        cache: whether layers from the first cut to the last decode with what the last one left.
    """

    flat: Annotated[float, wn.Between(-1)] = 0.8
    key: wn.Share = 0.08
    overall: wn.Share = 0.0012
    individual: Annotated[float, wn.Between(0)] = 0.001
    layers: tuple[wn.Layer, ...] | None = None
    budget: wn.Budget | None = None
    equal: bool = False
    order: Literal["raster", "merged"] = "raster"
    row: wn.VisionAttention = wn.VisionAttention(layer=-1, query="auto")
    cache: bool = True

    identity = {"flat": 2.0, "overall": 0.0}
    released = {"equal": True, "order": "merged", "row": wn.VisionAttention(layer=-1), "positions": "compact"}

    def check(self) -> None:
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise wn.WinnowError(f"mustdrop: layers={self.layers!r}; allowed: ascending LM layers.")

    def at_budget(self, budget, content: int):
        """The cuts by count, and no window merged, so that the count is exact."""
        return self.replace(flat=2.0, budget=wn.Budget.parse(budget))

    def resolve(self, info: wn.ModelInfo):
        layers = self.layers or tuple(sorted({info.depth * k // 32 for k in (2, 6, 10, 14)} - {info.depth - 1}))
        return self.replace(layers=layers or None, row=self.row.resolve(info))

    def steps(self, info: wn.ModelInfo):
        steps = [wn.Step(wn.Point("projected"), self.enter, (self.row,))]
        steps += [wn.Step(wn.Point("blocks", 1), self.merge)] if self.flat <= 1 else []
        for number, text in enumerate(map(wn.TextAttention, self.layers or ())):
            cut = functools.partial(self.cut, text=text, part=(number + 1) / len(self.layers or ()))
            steps.append(wn.Step(wn.Point("layers", info.lm_layer(text.layer + 1)), cut, (text,)))
        if self.cache and self.layers and "kv" in info.points:
            whole = wn.Follow(tuple(range(self.layers[0], self.layers[-1] + 1)))
            steps.append(wn.KVStep(wn.Point("kv", self.layers[-1] + 1), lambda view, state: whole))
        return tuple(steps)

    def merge(self, view: wn.View, state: wn.State):
        """Behind the first block: flat windows become their means, in the place of the token in their middle."""
        rows = full_windows(view.layout, SIDE, view.ids.device)
        if view.n != view.layout.n or not len(rows):
            return wn.Observe(), state
        x, broken = unit(view.tokens)
        sums = torch.stack([item[rows].sum(1).square().sum(1) - item.square().sum(1)[rows].sum(1) for item in x])
        score = (sums / (SIDE**2 * (SIDE**2 - 1))).masked_fill(broken[:, rows].any(2), -torch.inf)
        flat = (score >= self.flat).sum(1, keepdim=True)
        merged = wn.rank_of(score) < (flat.amin(0, keepdim=True) if self.equal else flat)
        middle = rows[:, SIDE**2 // 2].expand(view.b, -1)
        flatness = score.new_full(view.ids.shape, -torch.inf).scatter(1, middle, score.masked_fill(~merged, -torch.inf))
        return means(rows, merged, view.n) or wn.Observe(), wn.State(token={"flatness": flatness})

    def enter(self, view: wn.View, state: wn.State):
        """Before the LM: the key tokens, remembered, and the order of the code."""
        score, tile = wn.comparable(view[self.row], view), wn.tile_of(view)
        held = torch.zeros_like(score, dtype=torch.float64).scatter_add_(1, tile, torch.ones_like(score).double())
        key = (wn.rank_in_tile(score, tile) < (held * self.key).ceil().gather(1, tile)) & (score > -torch.inf)
        order, state_after = torch.arange(view.n, device=tile.device).expand(view.b, -1), wn.State(token={"key": key})
        if self.order == "raster":
            return wn.Reduction.select(order, view.n), state_after
        if "flatness" in state.token:
            order = (wn.rank_in_tile(state.token["flatness"], tile) + tile * view.n).argsort(1)
        return wn.Reduce(wn.Reduction.select(order, view.n, ordered=False), "drop"), state_after

    def cut(self, view: wn.View, state: wn.State, text: wn.TextAttention, part: float) -> wn.Reduction:
        """What stays of the image behind a layer."""
        total, most = (wn.comparable(values, view) for values in view[text].unbind(-1))
        key = state.token.get("key", torch.zeros_like(total, dtype=torch.bool))
        if self.budget is not None:
            step = round(float(self.budget.share(view.n_visual)) ** part * view.n_visual)
            return wn.top_k(key * view.n - wn.rank_of(total), max(self.budget.of(view), step))
        least = self.overall * total.masked_fill(total == -torch.inf, 0).sum(1, keepdim=True)
        found = wn.Reduction.select(key | ((total > -torch.inf) & ((total >= least) | (most >= self.individual))))
        index = found.representatives
        return dataclasses.replace(found, index=torch.where(found.valid, index, index[:, :1]))  # no broken token pads
