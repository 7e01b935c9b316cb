"""Keeping the best tokens, each of the others merged into the one that it is most like: as a mean, or by halves.

By halves tokens are merged one after the other, each time as the mean of what is there and what comes, so that late
ones count most (HoliTom's code).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.reduction import Reduction
from winnow.core.select import comparable, count_broken, ranked
from winnow.core.view import View
from winnow.parts.cosine import product, unit

Merge = Literal["mean", "halving"]


def into_nearest(
    view: View, score: Float[Tensor, "b n"], keep: int, merge: Merge, size: Float[Tensor, "b n"]
) -> Reduction:
    """Keep the tokens with the highest scores, in their order, each with those merged into it that are most like it.

    Likeness is the cosine of tokens. Broken tokens are kept last, and merged into none. No host read; a table of kept ×
    merged tokens for each item.

    Args:
        keep: at most as many as there are.
        size: what each token counts in a mean.
    """
    x, broken = unit(view.tokens)
    count_broken(broken, view)
    if keep >= view.n:
        return Reduction.select(torch.arange(view.n, device=view.tokens.device).expand(view.b, -1), view.n)
    best, rest = ranked(comparable(score, view).masked_fill(broken, -torch.inf)).split([keep, view.n - keep], dim=1)
    rest = rest.sort(1).values
    likeness = product([a[i] for a, i in zip(x, rest, strict=True)], [a[i] for a, i in zip(x, best, strict=True)])
    nearest = likeness.masked_fill_(broken.gather(1, best)[:, None], -2).argmax(2)  # of equal ones the best
    kept, order = best.sort(1)
    owner = order.argsort(1).gather(1, nearest).masked_fill_(broken.gather(1, rest), keep)
    places = torch.arange(keep, device=kept.device).expand_as(kept)
    cluster = torch.empty_like(view.ids).scatter_(1, kept, places).scatter_(1, rest, owner)
    if merge == "halving":
        others, own = halving_weights(owner, keep)
        weight = torch.empty_like(size, dtype=own.dtype).scatter_(1, kept, own).scatter_(1, rest, others)
    else:
        total = size.new_zeros(view.b, keep + 1).scatter_add_(1, cluster, size)
        weight = size / total.gather(1, cluster)
    cluster = cluster.masked_fill(cluster == keep, -1)
    return Reduction.assign(cluster, weight, m=keep, representative=kept)


def halving_weights(owner: Int[Tensor, "b r"], targets: int) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b k"]]:
    """What each token counts in the target that it goes to, and what each target counts in itself.

    Args:
        owner: the target of each token, in the order in which they are merged; `targets` is none of them.
        targets: how many there are.
    """
    order = owner.argsort(dim=1, stable=True)
    grouped = owner.gather(1, order)
    ends = torch.searchsorted(grouped, grouped, right=True)
    to_come = ends - torch.arange(owner.shape[1], device=owner.device)  # this one counted
    halved = torch.empty_like(owner).scatter_(1, order, to_come)
    size = owner.new_zeros(owner.shape[0], targets + 1).scatter_add_(1, owner, torch.ones_like(owner))[:, :-1]
    return torch.exp2(-halved.float()), torch.exp2(-size.float())


def halving_naive(rows: Sequence[float], target: float) -> float:
    """A target after rows were merged into it one after the other: what the weights are tested against."""
    for row in rows:
        target = (target + row) / 2
    return target
