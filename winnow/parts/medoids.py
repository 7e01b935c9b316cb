"""k-medoids from a deterministic start, and spectral clustering on top of it (CenterCLIP).

The start is KKZ's: the longest token, then always the one that is farthest from all chosen so far. Then every token
goes to its nearest medoid, and each cluster chooses the member with the smallest sum of distances to the others, until
nothing moves. Ties go to the lowest index; a medoid stays in its own cluster, equal tokens elsewhere or not.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

Metric = Literal["euclidean", "manhattan", "cosine"]


def distances(x: Float[Tensor, "b n d"], metric: Metric, *, even: bool = True) -> Float[Tensor, "b n n"]:
    """Between the tokens of each item, which are taken one by one, so that a batch gives what its items give alone.

    Args:
        even: whether they are made the same there and back, and 0 from a token to itself. Else they are as they were
            rounded, which decides which of two is the centre of both.
    """
    if metric == "cosine":
        far = torch.stack([1 - own @ own.T for own in normalize(x, dim=-1)])
    else:
        far = torch.stack([torch.cdist(own, own, p=2.0 if metric == "euclidean" else 1.0) for own in x])
    if even:
        far = torch.maximum(far, far.mT)
        far.diagonal(dim1=1, dim2=2).zero_()
    return far


def k_medoids(
    far: Float[Tensor, "b n n"],
    length: Float[Tensor, "b n"],
    k: int,
    broken: Bool[Tensor, "b n"] | None = None,
    rounds: int = 100,
) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b n"]]:
    """The medoids of each item, ascending, and the number of the medoid that each token belongs to (−1: there is none).

    On a CPU it stops when nothing moves; elsewhere, where to look costs more than to go on, it takes all rounds, which
    gives the same.

    Args:
        far: distances.
        length: what decides on the first medoid.
        k: medoids, at most as many as there are tokens.
        broken: tokens that are medoids only when no others are left.
    """
    every = torch.arange(far.shape[1], device=far.device).expand(far.shape[:2])
    if k in (0, far.shape[1]):
        return every[:, :k], every if k else torch.full_like(every, -1)
    far = far - torch.diag_embed(torch.ones_like(length))  # of equal tokens each is nearest to itself
    unfit = torch.zeros_like(length, dtype=torch.bool) if broken is None else broken
    medoids = _farthest_first(far, length, k, unfit)
    for _ in range(rounds):
        owner = _nearest(far, medoids)
        moved = _centres(far, owner, k, unfit)
        settled = moved == medoids
        medoids = moved
        if far.device.type == "cpu" and bool(settled.all()):
            break
    medoids = medoids.sort(1).values
    return medoids, _nearest(far, medoids)


def _farthest_first(
    far: Float[Tensor, "b n n"], length: Float[Tensor, "b n"], k: int, unfit: Bool[Tensor, "b n"]
) -> Int[Tensor, "b k"]:
    lanes = torch.arange(far.shape[0], device=far.device)
    worst = torch.finfo(far.dtype).min
    picks = [length.masked_fill(unfit, worst).argmax(1)]
    gap = torch.full_like(length, torch.finfo(far.dtype).max)
    for _ in range(k - 1):
        gap = torch.minimum(gap, far[lanes, picks[-1]]).scatter(1, picks[-1][:, None], -torch.inf)
        picks.append(torch.where(unfit & (gap > worst), worst, gap).argmax(1))
    return torch.stack(picks, 1)


def _nearest(far: Float[Tensor, "b n n"], medoids: Int[Tensor, "b k"]) -> Int[Tensor, "b n"]:
    return far.gather(1, medoids[..., None].expand(-1, -1, far.shape[2])).argmin(1)


def _centres(
    far: Float[Tensor, "b n n"], owner: Int[Tensor, "b n"], k: int, unfit: Bool[Tensor, "b n"]
) -> Int[Tensor, "b k"]:
    """The member of each cluster with the smallest sum of distances to the others."""
    sums = torch.where(owner[:, None] == owner[..., None], far, 0).sum(2)
    sums = sums.masked_fill(unfit, torch.finfo(far.dtype).max)
    least = sums.new_full((len(sums), k), torch.inf).scatter_reduce_(1, owner, sums, "amin")
    places = torch.arange(sums.shape[1], device=far.device)
    best = torch.where(sums == least.gather(1, owner), places, sums.shape[1])
    return best.new_full((len(best), k), sums.shape[1]).scatter_reduce_(1, owner, best, "amin")


def spectral(x: Float[Tensor, "b n d"], k: int, sigma: float, near: int = 0) -> Float[Tensor, "b n k"]:
    """Tokens as rows of the k eigenvectors of the normalised Laplacian with the smallest eigenvalues, at length 1.

    The graph weighs exp(−|a − b|² / 2σ²). Signs of eigenvectors do not matter, because distances of rows do not depend
    on them.

    Args:
        near: edges of a token to its nearest ones, itself among them, that stay, or are edges of theirs; 0: all.
    """
    found = []
    for own in x:
        graph = torch.exp(-torch.cdist(own, own).square() / (2 * sigma**2))
        if near:
            least = graph.topk(min(near, len(graph)), dim=1).values[:, -1:]
            graph = torch.where((graph >= least) | (graph >= least).T, graph, 0)
        scale = graph.sum(1).rsqrt()
        laplacian = torch.diag_embed(torch.ones_like(scale)) - scale[:, None] * graph * scale
        found.append(normalize(torch.linalg.eigh(laplacian).eigenvectors[:, :k], dim=-1))
    return torch.stack(found)


def k_medoids_naive(far: Sequence[Sequence[float]], length: Sequence[float], k: int) -> tuple[list[int], list[int]]:
    """The same for one item, over lists: what `k_medoids` is tested against."""
    every = range(len(far))
    medoids = [max(every, key=lambda i: length[i])]
    while len(medoids) < k:
        others = [i for i in every if i not in medoids]
        medoids.append(max(others, key=lambda i: min(far[i][m] for m in medoids)))
    for _ in range(100):
        owner = _owners(far, medoids)
        clusters = [[i for i in every if owner[i] == c] for c in range(k)]
        moved = [min(own, key=lambda i, own=own: sum(far[i][j] for j in own)) for own in clusters]  # type: ignore[misc]
        if moved == medoids:
            break
        medoids = moved
    medoids = sorted(medoids)
    return medoids, _owners(far, medoids)


def _owners(far: Sequence[Sequence[float]], medoids: Sequence[int]) -> list[int]:
    def owner(i: int) -> int:
        return medoids.index(i) if i in medoids else min(range(len(medoids)), key=lambda c: far[i][medoids[c]])

    return [owner(i) for i in range(len(far))]
