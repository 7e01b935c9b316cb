"""Merging tokens into the most similar of a few targets."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from winnow.core.reduction import Reduction
from winnow.core.select import ranked
from winnow.parts.cosine import product


def strided_clusters(
    among: Int[Tensor, "b n"], keys: list[Float[Tensor, "p h"]], count: int
) -> tuple[Int[Tensor, "b c"], Int[Tensor, "b n"]]:
    """Evenly spaced targets among some tokens, and the number of the target that each of these is most similar to.

    Args:
        among: the tokens, as indices into the keys of their item.
        keys: of unit length, by which they are compared.
        count: targets; with 0 of them, tokens belong to none (−1). A target belongs to itself.
    """
    slots = torch.arange(count, device=among.device) * max(1, among.shape[1] // max(1, count))
    target = among[:, slots]
    if count == 0:
        return target, torch.full_like(among, -1)
    pairs = zip(keys, among, target, strict=True)
    own, theirs = zip(*((k[a], k[t]) for k, a, t in pairs), strict=True)
    owner = product(list(own), list(theirs)).argmax(2)
    owner[:, slots] = torch.arange(count, device=among.device)
    return target, owner


def weights_by_size(
    cluster: Int[Tensor, "b n"], size: Float[Tensor, "b n"], m: int
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b m"]]:
    """What each token counts in the mean of its cluster, by how many patches it stands for; the size of each cluster.

    Args:
        cluster: of each token; none is dropped.
        size: patches that each token stands for.
        m: clusters.
    """
    total = size.new_zeros(size.shape[0], m).scatter_add_(1, cluster, size)
    return size / total.gather(1, cluster), total


def sums_of_nearest(
    kept: Int[Tensor, " k"], keys: Float[Tensor, "n h"], weight: Float[Tensor, " n"], count: int
) -> Float[Tensor, "k n"]:
    """Each kept token of one item with its nearest others added, as weights of the tokens.

    Args:
        keys: of unit length, by which tokens are compared.
        weight: what a token counts where it is added; at 0 it is added last. A kept one counts 1 in its own sum.
        count: others that are added, as far as there are.
    """
    likeness = (keys[kept] @ keys.T).masked_fill_(weight == 0, -torch.inf).scatter_(1, kept[:, None], -torch.inf)
    near = ranked(likeness)[:, : min(count, len(keys) - 1)]
    return torch.zeros_like(likeness).scatter_(1, near, weight.to(likeness.dtype)[near]).scatter_(1, kept[:, None], 1)


def mixture(
    parts: Sequence[Sequence[tuple[Int[Tensor, " _"], Float[Tensor, "_ _"], Int[Tensor, " _"]]]], n: int
) -> Reduction:
    """One map of each item from those of its tiles, in their order; items may have unequal numbers of outputs.

    Args:
        parts: for each item, and each of its tiles: the tokens of the tile, each output as weights of these, and which
            of these each output stands for.
        n: tokens of an item.
    """
    matrices, anchors = [], []
    for tiles in parts:
        placed = [rows.new_zeros(len(rows), n).index_copy(1, tokens, rows) for tokens, rows, _ in tiles]
        matrices.append(torch.cat(placed))
        anchors.append(torch.cat([tokens[at] for tokens, _, at in tiles]))
    counts = tuple(map(len, anchors))
    return Reduction(
        n,
        max(counts),
        matrix=pad_sequence(matrices, batch_first=True),
        counts=counts if len(set(counts)) > 1 else None,
        representative=pad_sequence(anchors, batch_first=True),
        ordered=False,
    )


def sums_of_nearest_naive(
    kept: Sequence[int], likeness: Sequence[Sequence[float]], weight: Sequence[float], count: int
) -> list[list[float]]:
    """The same in lists, from the likeness of all tokens: what `sums_of_nearest` is tested against."""
    rows = []
    for i in kept:
        others = [j for j in range(len(likeness)) if j != i]
        near = sorted(others, key=lambda j: -likeness[i][j])[:count]
        rows.append([1.0 if j == i else weight[j] if j in near else 0.0 for j in range(len(likeness))])
    return rows
