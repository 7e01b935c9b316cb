"""Scissorhands (arXiv 2305.17118): drops the slots that were attended to less than average most often of late.

Looks at: which slots got less than the average attention from each of the last `history` queries. Cost: `history` rows
of attention in each layer, once; while decoding, one row for each token, and a bit of each row for each slot of a head.

Departs from the paper: the query heads of a KV head are averaged; a prompt is cut to `keep` at once; a slot was not
below average for queries before it. Of slots with equal counts the older go first, which the paper leaves open.

Departs from the released code: no code has been released.
"""

import torch
from torch import Tensor

from winnow.contract import (
    Action,
    Budget,
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVView,
    Observe,
    State,
    WinnowError,
    best_slots,
    register,
)
from winnow.parts.bits import packed, unpacked


@register("scissorhands")
class Scissorhands(CacheMethod):
    """Drops the slots that were attended to less than average most often of late, several at once.

    Args:
        keep: slots of a head that are left of the prompt; a list gives each layer its own number.
        history: the newest queries that count.
        recent_slots: the newest slots, which stay.
        limit: slots that a head holds at most while decoding, or a list of them for each layer; none: what is decoded
            stays.
        drop: slots that go at once when a head holds more than `limit`: a number, or a share of `limit`.
    """

    keep: KVBudget = KVBudget("20%")
    history: Count = 400
    recent_slots: Count = 10
    limit: Count | tuple[Count, ...] | None = None
    drop: Budget = Budget("50%")

    def check(self) -> None:
        if self.history < 1:
            raise WinnowError(f"scissorhands: history={self.history}; allowed: at least 1 query.")
        for limit in self.limits:
            if limit < 1 or self._left(limit) < self.recent_slots:
                raise WinnowError(
                    f"scissorhands: limit={self.limit!r} and drop={self.drop} leave less than {self.recent_slots} "
                    "newest slots, which stay; allowed: a larger limit, or a smaller drop or recent_slots."
                )

    @property
    def limits(self) -> tuple[int, ...]:
        """The limits of all layers that have their own, or the one of all of them."""
        return self.limit if isinstance(self.limit, tuple) else () if self.limit is None else (self.limit,)

    def _left(self, limit: int) -> int:
        """Slots that are left when limit + 1 are too many."""
        return limit + 1 - self.drop.of(limit)

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, min(self.recent_slots, view.n)

    def score(self, view: KVView) -> Tensor:
        """How seldom each slot was below average, as the prompt shows it; the newer of equals scores higher."""
        return by_count(low_rows(view, self.history))

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        """What is too much goes by the count of the last queries, those of earlier forwards among them."""
        low = low_rows(view, min(self.history, view.fresh))
        if "low" in state.token and low.shape[3] < self.history:
            low = torch.cat([unpacked(state.token["low"], self.history), low], 3)[..., -self.history :]
        low = torch.nn.functional.pad(low, (self.history - low.shape[3], 0))
        if self.limits:
            state = State({**state.token, "low": packed(low)}, state.item, state.request, state.summed)
        keep = self.budget_now(view)
        action: KVReduce | None = None
        if keep is not None and not keep.is_all:
            action = best_slots(by_count(low), keep, view, last=self.ends(view)[1])
        return (Observe() if action is None else action), state

    def budget_now(self, view: KVView) -> KVBudget | None:
        if view.moment != "decode":
            return self.keep
        limit = view.budget(KVBudget.parse(self.limit))  # type: ignore[arg-type]
        return None if view.n <= limit else KVBudget(self._left(limit))


def low_rows(view: KVView, window: int) -> Tensor:
    """`[b, G, N, w]` whether each slot got less than average from each of the last w queries that read it."""
    found, visible = [], view.visible(window)
    for part, attention in view.attention_parts(window):
        seen = visible[:, part]
        average = 1 / seen.sum(-1, keepdim=True).float()
        found.append(~(view.per_kv_head(attention) >= average[:, None]) & seen[:, None])  # NaN is low
    return torch.cat(found, 2).transpose(2, 3)


def by_count(low: Tensor) -> Tensor:
    """`[b, G, N]` higher for slots that were low less often; among equals the newer is higher."""
    n = low.shape[2]
    newer = torch.arange(n, dtype=torch.float64, device=low.device) / n
    return newer - low.sum(3)
