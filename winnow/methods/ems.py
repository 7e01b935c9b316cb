"""EMS (arXiv 2412.08521): evicts what neither the question nor the whole context attends to, and merges what repeats.

Looks at: attention of the last `window` queries, and of all of them. Cost: all rows of attention in each layer, once,
in blocks of rows (N² · d, N memory); similarity of up to `reach` times as many keys as are kept with those; while
decoding under a limit one row of attention for each token.

Departs from the paper: query heads of one KV head are averaged. The share of the score that is merged rather than
evicted, its bound, the threshold of the zero class and the window are not known from the paper. Keys are not merged by
default, because members of a class have other rotary phases.

Departs from the released code: no code has been released.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

from winnow.contract import (
    Action,
    Between,
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVView,
    Observe,
    Reduction,
    Share,
    State,
    best_slots,
    register,
)
from winnow.parts.accumulated import observed
from winnow.parts.classes import candidates, nearest_class, weighted_classes
from winnow.parts.pooling import pooled_along


@register("ems")
class EMS(CacheMethod):
    """Keeps what the end or the whole of the prompt attends to, and merges into it what resembles it.

    Args:
        keep: slots of a head, the window among them.
        window: tokens at the end that vote, and stay as they are.
        kernel: width of the pooling of scores along the sequence; 1 for none.
        pool: the mean of the neighbours, or the largest.
        scores: the larger of both, or attention of the window or of all queries alone.
        mass: slots that hold this share of the score are merged if they are not kept; the others are evicted.
        reach: at most so many times the kept slots are merged.
        zero: similarity of the zero class, which takes and drops what resembles no kept slot more than this; above 1,
            nothing is merged.
        merge_keys: whether keys are merged as values are.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two compressions.
    """

    recent = 64

    keep: KVBudget = KVBudget("20%")
    window: Count = 32
    kernel: Count = 7
    pool: Literal["mean", "max"] = "mean"
    scores: Literal["both", "window", "all"] = "both"
    mass: Share = 0.95
    reach: Annotated[float, Between(0)] = 4
    zero: float = 0.6
    merge_keys: bool = False
    limit: Count | None = None
    every: Count = 32

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, view.rows(self.window)

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        """What is too much goes by the scores of all queries so far; a class goes on with the sum of its own."""
        keep = self.budget_now(view)
        stays = keep is None or keep.is_all
        if self.limit is None:
            found = None if stays else self.shorten(view, keep)  # type: ignore[arg-type]
        else:
            state = observed(view, state)
            found = None if stays else self._shortened(view, keep, self._scores(view, state))  # type: ignore[arg-type]
        return (Observe() if found is None else found), state

    def score(self, view: KVView) -> Tensor:
        return self._scores(view, observed(view, State()))

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        return None if keep.is_all else self._shortened(view, keep, self.score(view))

    def _scores(self, view: KVView, state: State) -> Tensor:
        """The larger of what the window and, at the same scale, all queries gave each slot."""
        local = view.attention(self.window).mean(2)
        rows = state.token["rows"].clamp_min(1)[..., None]
        whole = (state.summed["mass"] / rows).transpose(2, 3).flatten(1, 2)
        whole = whole * (local.sum(-1, keepdim=True) / whole.sum(-1, keepdim=True).clamp_min(1e-30))
        found = {"window": local, "all": whole, "both": torch.maximum(local, whole)}[self.scores]
        return view.per_kv_head(pooled_along(found, self.kernel, self.pool))

    def _shortened(self, view: KVView, keep: KVBudget, scores: Tensor) -> KVReduce | None:
        last = self.ends(view)[1]
        chosen = best_slots(scores, keep, view, last=last)
        if chosen is None:
            return None
        kept = chosen.k.representatives
        centres = kept[..., : max(0, kept.shape[2] - last)]
        most = min(view.n - kept.shape[2], int(self.reach * kept.shape[2]))
        merged, live = candidates(scores, kept, last, self.mass, most)
        target = nearest_class(view.keys, merged, centres, self.zero).masked_fill(~live, -1)
        view.notes.update(merged=(target >= 0).sum(), unlike=(live & (target < 0)).sum())
        v = weighted_classes(scores, kept, merged, target)
        return KVReduce(v if self.merge_keys else Reduction.select(kept, view.n), v)
