"""Ada-KV (arXiv 2407.11550): shares the slots of a layer out over its heads by the scores of another method.

Looks at: what that method looks at. Cost: that of the method, a sort of all scores of a layer, and a host read for the
lengths of the heads. Each head is stored in its own length; nothing is held for what only others keep.

Departs from the paper: scores of KV heads, not of query heads, are ranked. Where they are not shares of attention, as
with norms of keys, those of one head say nothing beside another's; they are then made shares of each head first. Kinds
of tokens that have their own budgets are shared out apart. What is decoded stays, as there, unless `limit` is set.
Heads that hold different numbers are not seen together, so what a later turn adds is shared out among heads of one
length, and a limit is that of each head by itself.
Departs from the released code: `released` ranks as kvpress's AdaKVPress over its SnapKVPress, which hides what it drops
behind false keys and stores it. The authors' code adds its floor to a part of what a head wins; here each head has it.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

import winnow.contract as wn


@wn.register("adakv")
class AdaKV(wn.CacheMethod):
    """Keeps the slots of a layer that score best over all its heads, so that heads hold different numbers of them.

    Args:
        keep: slots of a head, on average over the heads of a layer.
        base: the method that scores, with its settings but budgets, which are those here: `snapkv`, `snapkv:window=16`,
            `[snapkv:window=16,kernel=3]`.
        floor: the share of the average that each head keeps at least.
        scale: whether each head's scores are made shares of its own: `auto` where the method's are not comparable
            between heads, or `always`, or `never`.
        limit: slots that any head holds at most while decoding, and `every` more: it then drops what the method itself
            would; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "base": "snapkv:released", "floor": 0.2, "scale": "never"}

    keep: wn.KVBudget = wn.KVBudget("20%")
    base: str | tuple[str, ...] = "snapkv"
    floor: wn.Share = 0.2
    scale: Literal["auto", "always", "never"] = "auto"
    limit: wn.Count | None = None
    every: wn.Count = 64

    @cached_property
    def scorer(self) -> wn.CacheMethod:
        """The method that scores, with the budgets of this one."""
        found: Any = wn.method_of(self.base if isinstance(self.base, str) else ",".join(self.base))
        own, plain = type(found), wn.CacheMethod
        if not isinstance(found, plain) or own.score is plain.score or own is AdaKV:
            raise wn.WinnowError(f"adakv: base={found.slug} does not keep slots by a score; name one such as snapkv.")
        budgets = {name: getattr(self, name) for name in ("keep", "limit", "every") if name in own.settings()}
        if self.limit is not None and ("limit" not in own.settings() or own.evict is not plain.evict):
            raise wn.WinnowError(f"adakv: limit={self.limit}, which base={found.slug} cannot keep; leave limit unset.")
        scorer: wn.CacheMethod = found.replace(**budgets)
        return scorer

    def check(self) -> None:
        _ = self.scorer  # which refuses what cannot be a base

    def steps(self, info: wn.ModelInfo) -> tuple[wn.KVStep, ...]:
        own = self.scorer.steps(info)
        return tuple(replace(step, run=self.evict) for step in own if step.run == self.scorer.evict)

    def ends(self, view: wn.KVView) -> tuple[int, int]:
        return self.scorer.ends(view)

    def budget_now(self, view: wn.KVView) -> wn.KVBudget | None:
        return self.scorer.budget_now(view)

    def score(self, view: wn.KVView) -> Tensor:
        """The scores of the method, comparable between heads."""
        scores = self.scorer.score(view)
        scores = wn.comparable(scores.flatten(0, 1)).view_as(scores)
        wanted = not self.scorer.one_scale if self.scale == "auto" else self.scale == "always"
        return shares(scores) if wanted else scores

    def shorten(self, view: wn.KVView, keep: wn.KVBudget) -> wn.KVReduce | None:
        if view.moment == "decode":
            return self.scorer.shorten(view, keep)
        scores, (first, last) = self.score(view), self.ends(view)
        if type(self.scorer).shorten is wn.CacheMethod.shorten:
            alone = wn.best_slots(scores, keep, view, first=first, last=last)
        else:
            alone = self.scorer.shorten(view, keep)
        if alone is None:
            return None
        if alone.k is not alone.v or not alone.k.is_selection or alone.k.counts or alone.log_bias is not None:
            raise wn.WinnowError(f"adakv: base={self.scorer.slug} does more than keep as many slots in each head.")
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, alone.k.representatives, True)
        place = torch.arange(view.n, device=kept.device)
        ends = kept & ((place < first) | (place >= view.n - last))
        stays = torch.zeros_like(kept)
        for kind in view.kinds.unique() if keep.is_kinds and view.kinds is not None else (None,):
            mine = torch.ones_like(kept) if kind is None else view.kinds == kind
            stays |= self._shared(scores.masked_fill(ends, torch.inf), mine, int((kept & mine)[0, 0].sum()))
        return wn.keep_slots(wn.Reduction.select(stays, counts=tuple(stays.sum(-1).flatten().tolist())))

    def _shared(self, scores: Tensor, mine: Tensor, each: int) -> Tensor:
        """Which of some slots stay, `each` of a head on average. Equal scores: the better placed in its head first."""
        order = wn.ranked(scores.masked_fill(~mine, -torch.inf).flatten(0, 1)).view_as(scores)
        best = scores.gather(-1, order).masked_fill(~mine.gather(-1, order), -torch.inf)
        best[..., : int(self.floor * each)] = torch.inf
        b, g, n = best.shape
        first = wn.ranked(best.transpose(1, 2).reshape(b, n * g))[:, : g * each]
        won = torch.zeros(b, n * g, dtype=torch.bool, device=best.device).scatter_(1, first, True)
        return torch.zeros_like(mine).scatter_(-1, order, won.view(b, n, g).transpose(1, 2))


def shares(scores: Tensor) -> Tensor:
    """Each head's scores above its lowest, as shares of their sum; what has none keeps none."""
    real = scores.isfinite()
    low = scores.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    above = (scores - low).masked_fill(~real, 0)
    return torch.where(real, above / above.sum(-1, keepdim=True).clamp_min(1e-30), scores)
