"""Ada-KV (arXiv 2407.11550): shares the slots of a layer out over its heads by the scores of another method.

Looks at: what that method looks at. Cost: that of the method, one sort of all scores of a layer, and one host read for
the lengths of the heads. Each head is stored in its own length; nothing is held for what only others keep.

Departs from the paper: scores of KV heads, not of query heads, are ranked. Where they are not shares of attention, as
with norms of keys, those of one head say nothing beside another's; they are then made shares of each head first. Kinds
of tokens that have their own budgets are shared out apart.
Departs from the released code: `released` ranks as kvpress's AdaKVPress over its SnapKVPress. That one stores what it
drops and hides it behind false keys; here it is gone. The authors' code adds its floor to a part of what a head wins;
kvpress, and this, see to it that each head has it.
"""

from typing import Literal

import torch
from torch import Tensor

from winnow.contract import (
    CacheMethod,
    KVBudget,
    KVReduce,
    KVView,
    Reduction,
    Share,
    WinnowError,
    best_slots,
    comparable,
    keep_slots,
    method_of,
    ranked,
    register,
)


@register("adakv")
class AdaKV(CacheMethod):
    """Keeps the slots of a layer that score best over all its heads, so that heads hold different numbers of them.

    It acts behind the prefill; what is decoded stays.

    Args:
        keep: slots of a head, on average over the heads of a layer.
        base: the method that scores, with its settings: `snapkv`, `snapkv:window=16`, or `[snapkv:window=16,kernel=3]`.
        floor: the share of the average that each head keeps at least.
        scale: whether each head's scores are made shares of its own: `auto` where the method's are not comparable
            between heads, or `always`, or `never`.
    """

    released = {"keep": "50%", "base": "snapkv:released", "floor": 0.2, "scale": "never"}

    keep: KVBudget = KVBudget("20%")
    base: str | tuple[str, ...] = "snapkv"
    floor: Share = 0.2
    scale: Literal["auto", "always", "never"] = "auto"

    @property
    def scorer(self) -> CacheMethod:
        """The method that scores, at this budget."""
        found = method_of(self.base if isinstance(self.base, str) else ",".join(self.base))
        if not isinstance(found, CacheMethod) or type(found).score is CacheMethod.score:
            raise WinnowError(f"adakv: base={found.slug} does not score slots of the cache; name one such as snapkv.")
        if type(found).shorten is not CacheMethod.shorten or "keep" not in found.settings():
            raise WinnowError(f"adakv: base={found.slug} does not keep slots by their scores alone; name another.")
        return found.replace(keep=self.keep)

    def check(self) -> None:
        if getattr(self.scorer, "limit", None) is not None:
            raise WinnowError(
                "adakv acts behind the prefill only: heads that hold different numbers are not seen together later; "
                f"leave the limit of {self.scorer.slug} unset."
            )

    def budget_now(self, view: KVView) -> KVBudget | None:
        return self.scorer.budget_now(view)

    def score(self, view: KVView) -> Tensor:
        """The scores of the method, comparable between heads."""
        scores = self.scorer.score(view)
        scores = comparable(scores.flatten(0, 1)).view_as(scores)
        wanted = not self.scorer.one_scale if self.scale == "auto" else self.scale == "always"
        return shares(scores) if wanted else scores

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        if keep.is_all or (not keep.is_kinds and not keep.is_mass and view.budget(keep) >= view.n):
            return None
        scores, (first, last) = self.score(view), self.scorer.ends(view)
        alone = best_slots(scores, keep, view, first=first, last=last)
        if alone is None:
            return None
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, alone.k.representatives, True)
        place = torch.arange(view.n, device=kept.device)
        ends = kept & ((place < first) | (place >= view.n - last))
        stays = torch.zeros_like(kept)
        for kind in view.kinds.unique() if keep.is_kinds and view.kinds is not None else (None,):
            mine = torch.ones_like(kept) if kind is None else view.kinds == kind
            stays |= self._shared(scores.masked_fill(ends, torch.inf), mine, int((kept & mine)[0, 0].sum()))
        lengths = tuple(stays.sum(-1).flatten().tolist())
        return keep_slots(Reduction.select(stays, counts=lengths))

    def _shared(self, scores: Tensor, mine: Tensor, each: int) -> Tensor:
        """Which of some slots stay, `each` of a head on average. Equal scores: the better placed in its head first."""
        order = ranked(scores.masked_fill(~mine, -torch.inf).flatten(0, 1)).view_as(scores)
        best = scores.gather(-1, order).masked_fill(~mine.gather(-1, order), -torch.inf)
        best[..., : int(self.floor * each)] = torch.inf
        b, g, n = best.shape
        first = ranked(best.transpose(1, 2).reshape(b, n * g))[:, : g * each]
        won = torch.zeros(b, n * g, dtype=torch.bool, device=best.device).scatter_(1, first, True)
        return torch.zeros_like(mine).scatter_(-1, order, won.view(b, n, g).transpose(1, 2))


def shares(scores: Tensor) -> Tensor:
    """Each head's scores above its lowest, as shares of their sum; what has none keeps none."""
    real = scores.isfinite()
    low = scores.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    above = (scores - low).masked_fill(~real, 0)
    return torch.where(real, above / above.sum(-1, keepdim=True).clamp_min(1e-30), scores)
