"""Many-to-many transforms: every token divides itself among the ones that are kept."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.parts.cosine import product


def shares(
    keys: list[Float[Tensor, "n d"]],
    kept: Int[Tensor, "b m"],
    tau: float,
    *,
    anchor: bool = False,
    first_stays: bool = False,
    broken: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b m n"]:
    """What each token gives to each kept one: a softmax of their cosines over the kept ones, so that columns sum to 1.

    Args:
        keys: of unit length, of each item.
        kept: tokens of each item.
        tau: temperature; towards 0 a token goes to the most similar.
        anchor: whether a kept token gives nothing away.
        first_stays: whether token 0, which is the first that is kept, neither gives nor takes ([CLS]).
        broken: tokens that take only where all are broken; one that is kept keeps itself, another gives to all alike.
    """
    b, n = kept.shape[0], keys[0].shape[0]
    lowest = torch.finfo(keys[0].dtype).min
    broken = torch.zeros(b, n, dtype=torch.bool, device=kept.device) if broken is None else broken
    logits = product([k[own] for k, own in zip(keys, kept, strict=True)], keys).div_(tau)
    logits.masked_fill_(broken.gather(1, kept)[..., None], lowest)
    logits[:, : int(first_stays)] = -torch.inf
    itself = torch.zeros_like(logits).scatter_(2, kept[..., None], 1)
    whole = torch.zeros_like(broken).scatter_(1, kept, True)
    whole = whole if anchor else whole & broken
    whole = whole | (torch.arange(n, device=kept.device) < int(first_stays))
    return torch.where(whole[:, None], itself, logits.softmax(1))


def transform(
    share: Float[Tensor, "b m n"], mass: Float[Tensor, "b n"]
) -> tuple[Float[Tensor, "b m n"], Float[Tensor, "b m"]]:
    """The means in which each token counts by its share and its mass, as a matrix, and the mass of each output."""
    given = share * mass[:, None]
    total = given.sum(2)
    return given / total[..., None], total


def restored(share: Float[Tensor, "b m n"], y: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
    """All tokens again, for dense tasks: each is the mean of the outputs, by what it gave to them."""
    return share.mT @ y


def shares_naive(likeness: Sequence[Sequence[float]], kept: Sequence[int], tau: float) -> list[list[float]]:
    """The shares of one item, from the cosines of all its tokens: what `shares` is tested against."""
    given = [[math.exp(likeness[i][j] / tau) for j in range(len(likeness))] for i in kept]
    total = [sum(column) for column in zip(*given, strict=True)]
    return [[value / total[j] for j, value in enumerate(row)] for row in given]
