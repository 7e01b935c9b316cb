"""DPC-KNN, density peaks by nearest neighbours: clusters around tokens that are dense and far from any denser one."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EQUAL = 1e-14  # squared distance over squared lengths up to which fp64 cannot tell two tokens apart


def density_peaks(
    tokens: Float[Tensor, "b n d"],
    clusters: int,
    broken: Bool[Tensor, "b n"] | None = None,
    *,
    neighbours: int | None = None,
) -> tuple[Int[Tensor, "b c"], Int[Tensor, "b n"]]:
    """The centres, best first, and the number of the centre that each token belongs to.

    Density is exp(−mean squared distance to the nearest tokens, itself among them), distances are divided by
    √D, and a token is as good a centre as its density × its distance to the nearest denser token (the largest distance
    of all, where none is denser). Tokens go to the nearest centre. Ties go to the lowest index, in distances that are
    worked out in fp64, so that none is lost beside large norms. One n × n table for each item.

    Args:
        broken: tokens that are centres only when no others are left, and belong to none (−1).
        neighbours: nearest tokens by which density is measured, as far as there are; by default as many as clusters.
    """
    near = clusters if neighbours is None else neighbours
    bad = torch.zeros_like(tokens[..., 0], dtype=torch.bool) if broken is None else broken
    found = [_clustered(*peak_scores(x, near, own), clusters, own) for x, own in zip(tokens, bad, strict=True)]
    centres, owners = zip(*found, strict=True)
    return torch.stack(centres), torch.stack(owners)


def peak_scores(
    tokens: Float[Tensor, "n d"], neighbours: int, broken: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """How good a centre each token of one item is (−inf for broken ones), and the distances between them."""
    far = _distances(tokens.double().masked_fill(broken[:, None], 0)).to(
        torch.promote_types(tokens.dtype, torch.float32)
    )
    nearest = far.topk(min(neighbours, tokens.shape[0]), largest=False).values
    density = (-nearest.square().mean(1)).exp()
    denser = density > density[:, None]
    score = far.masked_fill(~denser, torch.inf).amin(1).minimum(far.max()) * density
    return score.masked_fill(broken, -torch.inf), far


def _distances(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Distances over √D from one product of matrices in fp64; those within its rounding, of equal tokens, are 0."""
    x = x - x.mean(0)
    products = x @ x.T
    norms = products.diagonal()
    sums = norms[:, None] + norms
    squares = torch.sub(sums, products, alpha=2)
    return squares.masked_fill_(squares <= sums.mul_(EQUAL), 0).div_(x.shape[1]).sqrt_()


def _clustered(
    score: Float[Tensor, " n"], far: Float[Tensor, "n n"], clusters: int, broken: Bool[Tensor, " n"]
) -> tuple[Int[Tensor, " c"], Int[Tensor, " n"]]:
    centres = score.sort(descending=True, stable=True).indices[:clusters]
    owner = far[centres].argmin(0).masked_fill(broken, -1)
    return centres, owner.scatter(0, centres, torch.arange(clusters, device=owner.device))


def density_peaks_naive(
    tokens: Sequence[Sequence[float]], clusters: int, neighbours: int | None = None
) -> tuple[list[int], list[int]]:
    """The same for one item, over lists: the reference that `density_peaks` is tested against."""
    every = range(len(tokens))
    far = [[math.dist(a, b) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    near = min(len(tokens), neighbours or clusters)
    density = [math.exp(-sum(d * d for d in sorted(row)[:near]) / near) for row in far]
    widest = max(map(max, far))
    apart = [min((far[i][j] for j in every if density[j] > density[i]), default=widest) for i in every]
    centres = sorted(every, key=lambda i: -apart[i] * density[i])[:clusters]
    owner = [min(range(clusters), key=lambda c: far[i][centres[c]]) for i in every]
    for number, centre in enumerate(centres):
        owner[centre] = number
    return centres, owner
