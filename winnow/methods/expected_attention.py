"""Expected Attention (arXiv 2510.00636): keeps the cache slots that queries to come are expected to attend to.

Looks at: queries of the prompt (while decoding, of the last 128 tokens), keys, values. Cost: the mean and the
covariance of the queries, and one d × d form of each key for each query head.

Departs from the paper: none known. Where positions have three axes, later queries are taken to be text: they stand
behind all that was read, along each axis.
Departs from the released code: queries are turned back from where they stand, not computed anew. While decoding, later
positions are counted from the newest token; kvpress counts them from the number of queries that it remembers. What the
model scales its logits with is used in the place of 1/√d.
"""

from typing import Annotated

import torch
from torch import Tensor

from winnow.contract import Between, CacheMethod, Count, KVBudget, KVView, register


@register("expected-attention")
class ExpectedAttention(CacheMethod):
    """Keeps the slots with the largest expected attention of later queries, times the norm of their values.

    Args:
        keep: slots of a head, the sinks among them.
        n_future_positions: positions behind the prompt over which later queries are averaged.
        n_sink: tokens at the beginning that stay, and whose queries do not count.
        use_covariance: whether the spread of the queries counts, beside their mean.
        use_vnorm: whether attention is weighted with the norm of the values.
        epsilon: added to the attention before it is weighted.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {
        "keep": "50%",
        "n_future_positions": 512,
        "n_sink": 4,
        "use_covariance": True,
        "use_vnorm": True,
        "epsilon": 0.0,
    }
    recent = 128
    places = True
    one_scale = True

    keep: KVBudget = KVBudget("20%")
    n_future_positions: Annotated[int, Between(1)] = 512
    n_sink: Count = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: Annotated[float, Between(0)] = 0.0
    limit: Count | None = None
    every: Count = 512

    def ends(self, view: KVView) -> tuple[int, int]:
        return self.n_sink, 0

    def score(self, view: KVView) -> Tensor:
        """Sinks get the largest score of their head."""
        s = min(self.n_sink, view.n - 1)
        keys, values = view.keys[:, :, None, s:].float(), view.values[:, :, s:].float()
        mean, covariance = self.later_queries(view, s)
        logits = (keys @ mean[..., None])[..., 0] * view.scaling
        if covariance is not None:
            logits += ((keys @ covariance) * keys).sum(-1) * (view.scaling**2 / 2)
        scores = logits.softmax(-1).mean(2)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * values.norm(dim=-1)
        return torch.cat([scores.amax(-1, keepdim=True).expand(-1, -1, s), scores], -1)

    def later_queries(self, view: KVView, sinks: int) -> tuple[Tensor, Tensor | None]:
        """Mean `[b, G, r, d]` and covariance `[b, G, r, d, d]` of the queries to come, of the r heads of a KV head."""
        at, first = view.query_positions(), view.positions()[:, :1]
        newest = at[:, -1:].amax(-1, keepdim=True) if at.ndim == 3 else at[:, -1:]
        shift = (newest - at)[:, None]  # to the newest token, from which later positions are counted
        origin = view.turned(view.queries.float(), shift.expand(-1, view.queries.shape[1], *shift.shape[2:]))
        counts = torch.ones(view.b, 1, view.rows(), 1, device=at.device)
        if sinks:
            counts *= _behind(at[:, None], first[:, :, sinks - 1 : sinks])[..., None]
        total = counts.sum(2).clamp_min(1)
        mean = (origin * counts).sum(2) / total
        later = torch.arange(1, self.n_future_positions + 1, device=at.device)

        def ahead(x: Tensor) -> Tensor:
            return view.turned_on_average(x, later)

        by_group = (view.heads, view.group)
        if not self.use_covariance:
            return ahead(mean).unflatten(1, by_group), None
        centred = (origin - mean[:, :, None]) * counts
        covariance = centred.transpose(2, 3) @ centred / total[..., None]
        covariance = ahead(ahead(covariance).transpose(2, 3))
        return ahead(mean).unflatten(1, by_group), covariance.unflatten(1, by_group)


def _behind(at: Tensor, sink: Tensor) -> Tensor:
    """Which positions `[b, 1, q]` are behind a sink's `[b, 1, 1]`; on three axes, along any of them."""
    later = at > sink
    return later.any(-1) if at.ndim == 4 else later
