"""PyramidKV (arXiv 2406.02069): gives low layers more of the cache, high layers less, and chooses as SnapKV does.

Looks at: attention of the last `window` queries. Cost: that of SnapKV; the layers hold as much in all.

Departs from the paper: query heads of one KV head are averaged. Budgets count the window (the paper adds it), so that
the cache is as large as without a pyramid. Pooling is SnapKV's. Where the last layer would hold less than the
window, it gets the window and the first layer so much less; where the budget is below the window itself, or nearly
everything is kept, there is no pyramid. A share of a later turn is a pyramid of what that turn added.
Departs from the released code: `released` is kvpress's PyramidKVPress, which falls back to equal budgets wherever the
last layer would hold less than the window (below 1280 slots of a head, with its settings), and does not say so.
"""

from typing import Annotated, Literal

from winnow.contract import Between, Budget, CacheMethod, Count, KVBudget, KVView, WinnowError, register
from winnow.parts.pyramid import pyramid
from winnow.parts.window_votes import WindowVotes


@register("pyramidkv")
class PyramidKV(WindowVotes, CacheMethod):
    """Keeps more in low layers than in high ones: the slots that the last tokens attend to, and those tokens.

    Args:
        keep: slots of a head, on average over the layers: a count, a share, or bytes of the whole cache.
        beta: how many times the average is above what the last layer keeps; 1 for equal layers.
        window: tokens at the end of the prompt that vote, and stay.
        kernel: odd width of the pooling along the sequence that keeps neighbours of a peak together; 1 for none.
        pool: the mean of the neighbours, or the largest.
        narrow: where the last layer would keep less than the window: `clamp` gives it the window and makes the pyramid
            flatter; `equal` gives up the pyramid.
        limit: slots that a head holds at most while decoding, on average over the layers, and `every` more; none: what
            is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {
        "keep": "50%", "beta": 20, "window": 64, "kernel": 5, "pool": "mean", "narrow": "equal",
    }  # fmt: skip

    keep: KVBudget = KVBudget("20%")
    beta: Annotated[float, Between(1)] = 20
    window: Annotated[int, Between(1)] = 8
    kernel: Annotated[int, Between(1)] = 5
    pool: Literal["mean", "max"] = "mean"
    narrow: Literal["clamp", "equal"] = "clamp"
    limit: Count | None = None
    every: Count = 64

    def check(self) -> None:
        super().check()
        if self.keep.is_layers or self.keep.is_kinds or self.keep.is_mass:
            raise WinnowError(
                f"{self.slug}: keep={self.keep} says itself what each layer keeps; allowed: a count (512), a share "
                '("20%") or bytes ("1.5GB"), which the pyramid shares out over the layers.'
            )

    def budget_now(self, view: KVView) -> KVBudget | None:
        if view.moment == "prefill":
            return self.keep if self.keep.is_all else KVBudget(self._of_layer(view))
        if self.limit is None:
            return None
        own = self._layer(self.limit, None, view)
        return KVBudget(own) if view.n >= own + max(1, self.every) else None

    def _of_layer(self, view: KVView) -> int:
        """What this layer keeps of what it holds now."""
        if self.keep.is_bytes or Budget(self.keep.value).is_count:  # type: ignore[arg-type]
            return self._layer(view.budget(self.keep), view.n, view)
        share = float(Budget(self.keep.value).share(view.fresh) * view.fresh)  # type: ignore[arg-type]
        return view.n - view.fresh + self._layer(share, view.fresh, view)

    def _layer(self, mean: float, most: int | None, view: KVView) -> int:
        counts = pyramid(mean, self.window, view.depth, self.beta, most, clamp=self.narrow == "clamp")
        return max(1, counts[view.layer])
