"""VScan (arXiv 2505.22654): scan the picture as a whole and window by window, merge the rest, and cut again in the LM.

Looks at: [CLS] rows of a shallow block and of the feature block (all queries where there is no [CLS]), the projected
tokens, and one attention row of the LM layer in its middle. Cost: O(N · k · D) for merging; O(H · S · D) for the row.

Half of the tokens are local: those that the shallow block's [CLS] attends to, at most an equal share of them in each
window. The rest are global: those that the feature block's [CLS] attends to. Every other token goes to the kept token
of its tile that is most like it, which becomes the mean of all. Before the middle layer of the LM a third is left, by
the attention of the last prompt token in that layer.
Shallow block: 5 of 24 (CLIP-L, the sixth), 7 of 32 (Qwen2.5-VL); other towers: the same share of their depth. Windows
of 6 × 6 tokens, of 4 × 4 where a token is made of several patches; rest rows and columns belong to the last window.
Departs from the paper: nothing.
Departs from the released code: `keep` is for the whole item, split equally over its tiles, of which padding takes no
part. The code for LLaVA reads [CLS] (`query=cls`) and gives each window the whole number of its share, so that local
tokens can be fewer than half and the total falls short (`remainder=lose`); the code for Qwen2.5-VL fills them, as is
done here by default. Newlines stay. Positions are kept by default, as for all methods of winnow; the code for LLaVA
numbers them anew. The code for Qwen2.5-VL ranks in the LM without rotating queries and keys; this is not reproduced.
"""

from typing import Annotated, Literal

import torch

import winnow.contract as wn
from winnow.parts.cosine import product, unit
from winnow.parts.windows import windows


@wn.register("vscan")
class VScan(wn.Method):
    """Keep global and local tokens of the tower, merge the others into them, and cut to a third in the LM.

    Args:
        keep: content tokens that enter the LM.
        last: content tokens of the item that are left from the LM's `layer` on; default: a third of those that entered.
        layer: the LM layer before which the second cut is made; default: half of the depth.
        local: share of `keep` that is local.
        window: side of a window; default: see above.
        shallow: vision block of the local scan; default: see above (block 5 on plain tensors).
        remainder: local tokens that do not divide by the windows: `fill` or `lose` them.
        query: whose attention is read: that of `cls`, of `all`, or `auto`.
    """

    keep: wn.Budget = wn.Budget(96)
    last: wn.Budget | None = None
    layer: wn.Layer | None = None
    local: wn.Share = 0.5
    window: Annotated[int, wn.Between(1)] | None = None
    shallow: int | None = None
    remainder: Literal["fill", "lose"] = "fill"
    query: Literal["auto", "cls", "all"] = "auto"

    rounding = "floor"
    identity = {"keep": "100%", "last": "100%"}
    released = {"remainder": "lose", "query": "cls", "positions": "compact"}

    def at_budget(self, budget, content: int):
        """The second cut at the budget, the first at three times as many."""
        last = wn.Budget.parse(budget).rounded("floor")
        return self.replace(keep=min(content, 3 * max(1, last.of(content))), last=last)

    def resolve(self, info: wn.ModelInfo):
        shallow = int(info.vision_depth * 5 / 24 + 0.5) if self.shallow is None else self.shallow
        layer = info.depth // 2 if self.layer is None else self.layer
        window = self.window or (6 if info.merge == 1 else 4)
        return self.replace(shallow=min(shallow, info.vision_depth - 1), layer=layer, window=window)

    def signals(self):
        shallow = 5 if self.shallow is None else self.shallow
        return wn.VisionAttention(shallow, query=self.query), wn.VisionAttention(query=self.query)

    def steps(self, info: wn.ModelInfo):
        first = wn.Step(wn.Point("projected"), lambda view, state: self.reduce(view), self.signals())
        row = wn.LMAttention(info.lm_layer(self.layer or 0))
        return first, wn.Step(wn.Point("layers", row.layer), lambda view, state: self.cut(view, row), (row,))

    def cut(self, view: wn.View, row: wn.LMAttention) -> wn.Reduction:
        """What stays from the middle of the LM on."""
        return wn.top_k(view[row], max(1, view.n_lm // 3) if self.last is None else self.last.of(view), view)

    def reduce(self, view: wn.View) -> wn.Reduction:
        k = min(self.keep.of(view), view.n)
        x, broken = unit(view.tokens)
        wn.count_broken(broken, view)
        near, deep = (wn.comparable(view[s], view).masked_fill(broken, -torch.inf) for s in self.signals())
        kept = self._scan(near, deep, view, k)
        if kept.m == view.n:
            return kept
        at = kept.representatives
        alike = product(x, [own[rows] for own, rows in zip(x, at, strict=True)])
        if wn.n_tiles(view.layout) > 1:
            tile = wn.tile_of(view)
            alike.masked_fill_(tile[..., None] != tile.gather(1, at)[:, None], -2)
        owner = alike.argmax(2).masked_fill(broken, -1)
        owner.scatter_(1, at, torch.arange(kept.m, device=owner.device).expand(view.b, -1))
        size = near.new_zeros(view.b, kept.m + 1).scatter_add_(1, owner + 1, torch.ones_like(near))
        return wn.Reduction.assign(owner, 1 / size.gather(1, owner + 1), m=kept.m, representative=at)

    def _scan(self, near: torch.Tensor, deep: torch.Tensor, view: wn.View, k: int) -> wn.Reduction:
        """The tokens that are kept: local ones first, then global ones."""
        table, tile = windows(view.layout, self.window or 6, view.ids.device), wn.tile_of(view)
        quota = wn.quotas(view, k)
        local = (quota.double() * self.local).floor().long()
        several = torch.zeros_like(quota[0]).scatter_add_(0, table.tile, torch.ones_like(table.tile))
        least = local // several
        most = least if self.remainder == "lose" else -(-local // several)
        inside = wn.rank_in_tile(near, table.of[view.ids]) < most.gather(1, tile)
        first = wn.rank_in_tile(near.masked_fill(~inside, -torch.inf), tile) < local.gather(1, tile)
        first &= inside & (near > -torch.inf) & (deep > -torch.inf)
        if self.remainder == "fill":
            return wn.top_k_per_tile(deep.masked_fill(first, torch.inf), k, view)
        rest = wn.rank_in_tile(deep.masked_fill(first, -torch.inf), tile) < (quota - local).gather(1, tile)
        return wn.Reduction.select(first | rest)
