"""Merging tokens into the most similar of a few targets."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
