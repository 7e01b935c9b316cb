"""Merging what is not kept into a few centres and one token for all else, weighted by attention."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.reduction import Reduction
from winnow.core.select import places, rank_of, ranked
from winnow.parts.cosine import product


def recycled(
    main: Bool[Tensor, "b n"],
    rest: Bool[Tensor, "b n"],
    weight: Float[Tensor, "b n"],
    centres: Int[Tensor, "b 1"],
    extra: Bool[Tensor, "b 1"],
    keys: list[Float[Tensor, "n c"]],
    bonus: Float[Tensor, "b n"],
    merged: int,
    most: int,
    counts: tuple[int, ...] | None = None,
) -> Reduction:
    """Kept tokens as they stand, then the centres, then one token for the rest; sums are not divided by their weights.

    Args:
        main: tokens that are kept.
        rest: those that are merged; what is in neither is dropped.
        weight: of a token that is merged; the centres are the heaviest of the rest, the heaviest first.
        centres: how many there are.
        extra: whether there is a token for what is no centre.
        keys: of unit length, by which a centre finds the `merged` tokens that are most similar to it.
        bonus: what each token adds to that similarity.
        most: the largest number of centres; without `counts`, the outputs of every item.
        counts: outputs of each item, where they differ.
    """
    b, n = main.shape
    rank = rank_of(weight.masked_fill(~rest, -torch.inf))
    weight = weight.masked_fill(~rest, 0)
    centre = rest & (rank < centres)
    kept = main.sum(1, keepdim=True)
    other = rest & ~centre & extra
    slot = torch.where(main, main.cumsum(1) - 1, kept + torch.where(centre, rank, centres))
    slot = slot.masked_fill(~(main | centre | other), -1)
    parts = [(torch.arange(n, device=main.device).expand(b, -1), slot, torch.where(other, weight, 1))]
    near = min(merged, n - 1)
    if most and near:
        found = torch.full((b, most, near), -1, dtype=torch.int64, device=main.device)
        of = places(rank)[:, :most]
        for lane in range(b):
            alike = product([keys[lane][of[lane]]], [keys[lane]])[0] + bonus[lane]
            alike = alike.masked_fill(~rest[lane], -torch.inf).scatter_(1, of[lane][:, None], -torch.inf)
            best = ranked(alike)[:, :near]
            found[lane] = torch.where(alike.gather(1, best) > -torch.inf, best, -1)
        number = torch.arange(most, device=main.device)
        live = (found >= 0) & (number < centres)[..., None]
        target = torch.where(live, (kept + number)[..., None], -1).flatten(1)
        found = found.masked_fill(~live, 0).flatten(1)
        parts.append((found, target, weight.gather(1, found)))
    index, target, weights = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    m = most if counts is None else max(counts)
    return Reduction(
        n,
        m,
        index,
        target,
        weights,
        counts=None if counts is None or len(set(counts)) == 1 else counts,
        representative=_representatives(main | centre, slot, other, weight, m),
        ordered=False,
    )


def _representatives(
    own: Bool[Tensor, "b n"], slot: Int[Tensor, "b n"], other: Bool[Tensor, "b n"], weight: Float[Tensor, "b n"], m: int
) -> Int[Tensor, "b m"]:
    """Kept tokens and centres stand for themselves; the heaviest of the others stands for them all."""
    first = weight.masked_fill(~other, -torch.inf).argmax(1, keepdim=True)
    stands = own | (other & (torch.arange(own.shape[1], device=own.device) == first))
    places = torch.where(stands, slot, m)  # one more place, for those that stand for nothing
    made = torch.zeros(own.shape[0], m + 1, dtype=torch.int64, device=own.device)
    return made.scatter_(1, places, torch.arange(own.shape[1], device=own.device).expand_as(own))[:, :m]
