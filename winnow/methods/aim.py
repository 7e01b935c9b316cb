"""AIM (arXiv 2412.03248): merge similar tokens before the LM, and drop ever more in its deeper layers, at last all.

Looks at: the projected tokens, and all attention of the LM layers at which tokens are dropped. Cost: O(V² · D) for
merging, and for each cut the attention weights of one layer again, one T × T table for one head.

Merging, in each tile or frame: a half of the tokens, then a quarter, each into the most similar of those in odd places
(see `winnow/parts/aim_merge.py`). Dropping: PageRank over the attention of a layer at temperature 0.1, five rounds
without damping; the root mean square over heads ranks the tokens. From one layer to another the share that stays falls
linearly, to `left`. As published for 28 layers: 7/8 before layer 15, none before layer 22.
Departs from the paper: on other depths the cuts are at the same shares of the depth.
Departs from the released code: tokens are dropped, where the code masks them and computes them on; a dropped token has
no vote there but in the first of five rounds. Outputs stand in the order of the picture; the code puts tokens of an odd
rest that were not merged first (`order=matched`, the same for even numbers). The code numbers positions anew behind
merging and keeps them when it drops; `positions=compact` numbers anew in both. Its version for LLaVA-1.5 starts at
layer 13 of 32 (`first=14,last=21`) and merges at the tower's output by keys, which is not here. Any batch size.
"""

from fractions import Fraction
from functools import partial
from typing import Literal

import torch

import winnow.contract as wn
from winnow.parts.aim_merge import groups_of, in_place, merge_groups, schedule


@wn.register("aim")
class AIM(wn.Method):
    """Merge similar tokens before the LM; then drop a growing share by PageRank over the LM's attention.

    Args:
        rounds: of merging; each halves the number.
        first: the LM layer before which the first tokens are dropped; default: 15/28 of the depth.
        last: the one before which the last are, a share more at each layer between; default: 22/28 of the depth.
        left: budget behind that, of the tokens that entered the LM.
        damping: of PageRank: without it, votes move to early tokens.
        order: that of merged tokens.
    """

    rounds: wn.Count = 2
    first: wn.Layer | None = None
    last: wn.Layer | None = None
    left: wn.Budget = wn.Budget(0, allow_empty=True)
    damping: wn.Share = 0.0
    order: Literal["raster", "matched"] = "raster"

    rounding = "floor"
    identity = {"rounds": 0, "left": "100%"}
    released = {"order": "matched", "positions": "compact"}

    def check(self) -> None:
        if None not in (self.first, self.last) and not 0 < self.first <= self.last:  # type: ignore[operator]
            raise wn.WinnowError(f"aim: first={self.first}, last={self.last}; allowed: 0 < first ≤ last.")

    def at_budget(self, budget, content: int):
        """At most two rounds of merging that leave no less than the budget; dropping ends at it."""
        left = wn.Budget.parse(budget).rounded(self.rounding)
        after = [content - sum(gone for _, gone in schedule(content, rounds)) for rounds in range(3)]
        rounds = max(r for r in range(3) if after[r] >= left.of(content))
        if not left.is_count:  # of what merging leaves, so that the count is that of the share
            part = min(100.0, 100 * (left.of(content) + 0.5) / after[rounds])
            left = wn.Budget(f"{part:.6g}%", left.allow_empty, self.rounding)
        return self.replace(rounds=rounds, left=left)

    def resolve(self, info: wn.ModelInfo):
        last = max(1, info.at_depth(22 / 28)) if self.last is None else info.lm_layer(self.last)
        first = min(last, max(1, info.at_depth(15 / 28))) if self.first is None else info.lm_layer(self.first)
        return self.replace(first=first, last=last)

    def steps(self, info: wn.ModelInfo):
        merging = (wn.Step(wn.Point("projected"), lambda view, state: self._merge(view)),) if self.rounds else ()
        return merging + tuple(map(self._step, range(self.first or 0, (self.last or 0) + 1)))

    def _step(self, layer: int) -> wn.Step:
        rank = wn.PageRank(layer - 1, damping=self.damping)
        nothing = layer == self.last and self.left.of(2**30) == 0  # and so nothing to rank
        return wn.Step(wn.Point("layers", layer), partial(self._drop, rank), () if nothing else (rank,))

    def _drop(self, rank: wn.PageRank, view: wn.View, state: wn.State) -> wn.Reduction:
        kept = self.kept(rank.layer + 1, view.n_lm)
        return wn.top_k(view[rank], kept, view) if kept else wn.Reduction.select(view.ids[:, :0], view.n)

    def kept(self, layer: int, n_lm: int) -> int:
        """How many of the tokens that entered the LM are left before a layer."""
        first, last = self.first or 0, self.last or 0
        part = Fraction(layer - first + 1, last - first + 1)
        return max(self.left.of(n_lm), int(n_lm * (1 - part * (1 - self.left.share(n_lm)))))

    def _merge(self, view: wn.View) -> wn.Reduce:
        reduction = self.reduce(view)
        return wn.Reduce(reduction, "keep" if reduction.ordered else "drop")

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The map of merging: within tiles, or of all tokens alike where an earlier method has removed some."""
        x = view.tokens.to(torch.promote_types(view.tokens.dtype, torch.float32))
        broken = ~x.isfinite().all(-1)
        wn.count_broken(broken, view)
        whole = view.n == view.layout.n_content
        groups = groups_of(view.layout, x.device) if whole else (torch.arange(view.n, device=x.device),)
        found = [merge_groups(own, groups, self.rounds) for own in x.masked_fill(broken[..., None], 0)]
        cluster, weight, representative = (torch.stack(part) for part in zip(*found, strict=True))
        raster = self.order == "raster"
        if raster:
            representative, order = representative.sort(1)
            cluster = order.argsort(1).gather(1, cluster)
        sound = weight * ~broken  # a broken token is left out of a mean of others
        total = torch.zeros_like(representative, dtype=weight.dtype).scatter_add_(1, cluster, sound).gather(1, cluster)
        return wn.Reduction.assign(
            cluster,
            torch.where(total > 0, sound / total, weight),
            m=representative.shape[1],
            representative=representative,
            ordered=raster or (whole and in_place(view.layout, self.rounds)),
        )
