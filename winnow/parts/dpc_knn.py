"""DPC-KNN: clusters around tokens that are dense among their nearest and far from anything denser."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.select import ranked


class Clusters(NamedTuple):
    """Clusters of each item.

    Attributes:
        centre: `[b, m]` the token at the centre of each cluster, the best first.
        cluster: `[b, n]` the cluster of each token; a centre belongs to its own.
    """

    centre: Int[Tensor, "b m"]
    cluster: Int[Tensor, "b n"]


def dpc_knn(x: Float[Tensor, "b n d"], m: int, k: int) -> Clusters:
    """Density peaks: tokens whose density, times the distance to the nearest denser token, is largest.

    The density of a token is exp(−mean of the squared distances to its k nearest tokens, itself among them); distances
    are divided by √d. The densest token has the largest distance of its item instead. Equally dense: the lower index
    counts as denser. Ties go to the lowest index; no host read. A table of n × n for each item.

    Args:
        x: finite, at least fp32.
        m: clusters, at most n.
        k: neighbours, as far as there are.
    """
    n, d = x.shape[1:]
    # Item by item: a batched product need not give the bits that its items give alone.
    far = torch.stack([torch.cdist(item, item) for item in x]) / math.sqrt(d)
    far.diagonal(dim1=1, dim2=2).zero_()
    near = far.topk(min(k, n), dim=2, largest=False).values
    density = near.square().mean(2).neg().exp()
    rank = ranked(density)
    place = torch.empty_like(rank).scatter_(1, rank, torch.arange(n, device=x.device).expand_as(rank))
    denser = place[:, None, :] < place[..., None]  # b n n: whether the second is denser than the first
    apart = far.masked_fill(~denser, torch.inf).amin(2)
    apart = torch.where(place == 0, far.amax((1, 2))[:, None], apart)
    centre = ranked(density * apart)[:, :m]
    rows = torch.stack([item[at] for item, at in zip(far, centre, strict=True)])
    cluster = rows.argmin(1)
    return Clusters(centre, cluster.scatter_(1, centre, torch.arange(m, device=x.device).expand_as(centre)))


def dpc_knn_naive(x: Sequence[Sequence[float]], m: int, k: int) -> tuple[list[int], list[int]]:
    """Centres and clusters of one item, in lists: what `dpc_knn` is tested against."""
    n = len(x)
    far = [[math.dist(a, b) / math.sqrt(len(a)) for b in x] for a in x]
    density = [math.exp(-sum(f * f for f in sorted(row)[:k]) / min(k, n)) for row in far]
    apart = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if (-density[j], j) < (-density[i], i)]
        apart.append(min(denser) if denser else max(map(max, far)))
    centre = sorted(range(n), key=lambda i: -density[i] * apart[i])[:m]
    nearest = [min(range(m), key=lambda c: far[centre[c]][i]) for i in range(n)]
    return centre, [centre.index(i) if i in centre else nearest[i] for i in range(n)]
