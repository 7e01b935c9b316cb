"""DPC-KNN, density peaks by nearest neighbours: clusters around tokens that are dense and far from any denser one."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def density_peaks(
    tokens: Float[Tensor, "b n d"], clusters: int, broken: Bool[Tensor, "b n"] | None = None
) -> tuple[Int[Tensor, "b c"], Int[Tensor, "b n"]]:
    """The centres, best first, and the number of the centre that each token belongs to.

    Density is exp(−mean squared distance to the `clusters` nearest tokens, itself among them), distances are divided by
    √D, and a token is as good a centre as its density × its distance to the nearest denser token (the largest distance
    of all, where none is denser). Tokens go to the nearest centre. Ties go to the lowest index, in distances that are
    summed from differences, so that none is lost beside large norms. One n × n table for each item.

    Args:
        broken: tokens that are centres only when no others are left, and belong to none (−1).
    """
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if broken is not None:
        wide = wide.masked_fill(broken[..., None], 0)
    found = [_peaks(x, clusters, None if broken is None else broken[i]) for i, x in enumerate(wide)]
    centres, owners = zip(*found, strict=True)
    return torch.stack(centres), torch.stack(owners)


def _peaks(x: Float[Tensor, "n d"], clusters: int, broken: Bool[Tensor, " n"] | None) -> tuple[Tensor, Tensor]:
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[1])
    density = (-far.topk(clusters, largest=False).values.square().mean(1)).exp()
    denser = density > density[:, None]
    score = far.masked_fill(~denser, torch.inf).amin(1).minimum(far.max()) * density
    if broken is not None:
        score = score.masked_fill(broken, -torch.inf)
    centres = score.sort(descending=True, stable=True).indices[:clusters]
    owner = far[centres].argmin(0)
    if broken is not None:
        owner = owner.masked_fill(broken, -1)
    return centres, owner.scatter(0, centres, torch.arange(clusters, device=x.device))


def density_peaks_naive(tokens: Sequence[Sequence[float]], clusters: int) -> tuple[list[int], list[int]]:
    """The same for one item, over lists: the reference that `density_peaks` is tested against."""
    every = range(len(tokens))
    far = [[math.dist(a, b) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in far]
    widest = max(map(max, far))
    apart = [min((far[i][j] for j in every if density[j] > density[i]), default=widest) for i in every]
    centres = sorted(every, key=lambda i: -apart[i] * density[i])[:clusters]
    owner = [min(range(clusters), key=lambda c: far[i][centres[c]]) for i in every]
    for number, centre in enumerate(centres):
        owner[centre] = number
    return centres, owner
