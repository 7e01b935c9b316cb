"""SnapKV (arXiv 2404.14469): keeps the cache slots that the last tokens of the prompt attend to.

Looks at: attention of the last `window` queries. Cost: `window` rows of attention in each layer, once, and one more
time for each eviction while decoding.

Departs from the paper: query heads of one KV head are averaged (the paper stores a cache for each query head). The
window is 32 and pooling the mean of 5, as the authors' code sets them; their LongBench runs pool by the largest of 7.
What is decoded stays, as there, unless `limit` is set, and then the last `window` tokens vote again. A budget below the
window keeps the window; the authors' code stops.
Departs from the released code: `released` is kvpress's SnapKVPress, which the authors' code equals but for the mean
over query heads. kvpress computes 1 − ratio in floats and rounds down, so that a ratio of 0.8 keeps 39 of 200 slots:
`keep=1 - 0.8` does so here, and "20%" keeps 40. It refuses prompts that are no longer than the window.
"""

from typing import Annotated, Literal

from winnow.contract import Between, CacheMethod, Count, KVBudget, register
from winnow.parts.window_votes import WindowVotes


@register("snapkv")
class SnapKV(WindowVotes, CacheMethod):
    """Keeps the slots that the last tokens of the prompt attend to, and those tokens.

    Args:
        keep: slots of a head, the window among them.
        window: tokens at the end of the prompt that vote, and stay.
        kernel: odd width of the pooling along the sequence that keeps neighbours of a peak together; 1 for none.
        pool: the mean of the neighbours, or the largest.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "window": 64, "kernel": 5, "pool": "mean"}

    keep: KVBudget = KVBudget("20%")
    window: Annotated[int, Between(1)] = 32
    kernel: Annotated[int, Between(1)] = 5
    pool: Literal["mean", "max"] = "mean"
    limit: Count | None = None
    every: Count = 64
