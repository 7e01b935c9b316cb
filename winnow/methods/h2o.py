"""H2O (arXiv 2306.14048): keeps the cache slots that have got most attention so far, and the newest ones.

Looks at: attention of all queries, summed over them in chunks of rows. Cost: the attention weights of each layer once
more, and two rows of numbers beside the cache.

Departs from the paper: query heads of one KV head are averaged (the paper's models have as many of both).
Departs from the released code: `released` is kvpress's ObservedAttentionPress, which takes the mean over the queries
that read a slot and keeps no window. The authors' own code also sums over the samples of a batch.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor

from winnow.contract import (
    Action,
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVView,
    Observe,
    Share,
    State,
    best_slots,
    register,
)


@register("h2o")
class H2O(CacheMethod):
    """Keeps the heavy hitters, which all queries together attended to most, and a window of the newest slots.

    Args:
        keep: slots of a head, the window among them.
        recent_share: the share of these that is the window; with a budget by mass or by kind there is none.
        average: the sum of the attention that a slot got, or its mean over the queries that could read it.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "recent_share": 0.0, "average": "mean"}

    one_scale = True

    keep: KVBudget = KVBudget("20%")
    recent_share: Share = 0.5
    average: Literal["sum", "mean"] = "sum"
    limit: Count | None = None
    every: Count = 1

    def score(self, view: KVView) -> Tensor:
        return self.worth(self.observed(view, State()))

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        return self.cut(view, keep, self.score(view))

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        if self.keep.is_all and self.limit is None:
            return Observe(), state
        state = replace(state, token={**state.token, **self.observed(view, state)})
        keep = self.budget_now(view)
        action = None if keep is None else self.cut(view, keep, self.worth(state.token))
        return (Observe() if action is None else action), state

    def observed(self, view: KVView, state: State) -> dict[str, Tensor]:
        """`[b, G, N]` what each slot has got so far, and from how many queries."""
        found = {"attention": view.per_kv_head(view.mass())}
        if self.average == "mean":
            found["readers"] = view.readers()[:, None].expand_as(found["attention"]).float()
        return {name: x + state.token[name] if name in state.token else x for name, x in found.items()}

    def worth(self, observed: dict[str, Tensor]) -> Tensor:
        if self.average == "sum":
            return observed["attention"]
        return observed["attention"] / observed["readers"].clamp_min(1)

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, self.window(view, self.keep)

    def window(self, view: KVView, keep: KVBudget) -> int:
        return 0 if keep.is_mass or keep.is_kinds else int(view.budget(keep) * self.recent_share)

    def cut(self, view: KVView, keep: KVBudget, scores: Tensor) -> KVReduce | None:
        return best_slots(scores, keep, view, last=self.window(view, keep))
