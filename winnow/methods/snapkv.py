"""SnapKV (arXiv 2404.14469): keeps the cache slots that the last tokens of the prompt attend to.

Looks at: attention of the last `window` queries. Cost: `window` rows of attention in each layer, once.

Departs from the paper: query heads of one KV head are averaged (the paper stores a cache for each query head).

Departs from the released code: the window stays in the order of the prompt, like all that is kept.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from winnow.contract import CacheMethod, Count, KVBudget, KVView, register


@register("snapkv")
class SnapKV(CacheMethod):
    """Keeps the slots that the last tokens of the prompt attend to, and those tokens.

    Args:
        keep: slots of a head, the window among them.
        window: tokens at the end of the prompt that vote, and stay.
        kernel: width of the pooling along the sequence that keeps neighbours of a peak together; 1 for none.
        pool: the mean of the neighbours, or the largest.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "window": 64, "kernel": 5, "pool": "mean"}
    recent = 64

    keep: KVBudget = KVBudget("20%")
    window: Count = 32
    kernel: Count = 5
    pool: Literal["mean", "max"] = "mean"
    limit: Count | None = None
    every: Count = 64

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, view.rows(self.window)

    def score(self, view: KVView) -> Tensor:
        w = view.rows(self.window)
        votes = view.attention(w).mean(2)[..., : view.n - w]
        pooled = pooled_along(votes, self.kernel, self.pool)
        return F.pad(view.per_kv_head(pooled), (0, w), value=1.0)


def pooled_along(x: Tensor, kernel: int, pool: str) -> Tensor:
    """`[b, h, n]` pooled over neighbours along the sequence, its length unchanged."""
    if kernel < 2 or not x.shape[2]:
        return x
    pooling = F.avg_pool1d if pool == "mean" else F.max_pool1d
    return pooling(x, kernel, stride=1, padding=kernel // 2)[..., : x.shape[2]]
