"""Throwing away duplicates round by round, as ToMe matches tokens, but dropping where it merges (VisPruner)."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.parts.cosine import product

STEP = 8  # tokens that a round drops at most
SHRINK = 1.25  # the table is cut to the tokens that are left when it has this many times their number


@torch.no_grad()
def without_duplicates(
    x: list[Float[Tensor, "n d"]], among: Int[Tensor, "b r"], count: int, broken: Bool[Tensor, "b n"]
) -> Int[Tensor, "b count"]:
    """The tokens that are left of some when those are dropped that are most like others.

    In each round the tokens at even places of the list are compared with those at odd places, and up to 8 are dropped
    whose most similar one is most similar. What is left of the even places, by descending similarity, then the odd
    places, is the list of the next round.

    Args:
        x: of unit length.
        among: the tokens, in the order of the first list; between 1 and all of them are left.
        broken: are dropped before others, and are like none.

    One V × V table for each item; a round reads half of its rows. No host read; among equals the first is dropped.
    """
    table = product(x, x).masked_fill_(broken[:, :, None], -torch.inf).masked_fill_(broken[:, None, :], torch.inf)
    table, names = _cut(table, among), among
    left = torch.arange(among.shape[1], device=among.device).expand_as(among)
    buffer = table.new_empty(table.shape[0] * (table.shape[1] // 2) * table.shape[1])
    while (drop := min(STEP, left.shape[1] - count, (left.shape[1] + 1) // 2)) > 0:
        if table.shape[1] > SHRINK * left.shape[1]:
            table, names = _cut(table, left), names.gather(1, left)
            left = torch.arange(left.shape[1], device=left.device).expand_as(left)
        even, odd = left[:, ::2], left[:, 1::2]
        closest = _closest(table, odd, buffer).gather(1, even)
        order = torch.sort(closest, dim=1, descending=True, stable=True).indices
        left = torch.cat([even.gather(1, order[:, drop:]), odd], 1)
    return names.gather(1, left)


def _cut(table: Float[Tensor, "b n n"], left: Int[Tensor, "b r"]) -> Float[Tensor, "b r r"]:
    """The rows and columns of some tokens, in their order."""
    return torch.stack([own[at][:, at] for own, at in zip(table, left, strict=True)])


def _closest(table: Float[Tensor, "b n n"], to: Int[Tensor, "b m"], buffer: Tensor) -> Float[Tensor, "b n"]:
    """The similarity of each token to the most similar of some."""
    b, n, _ = table.shape
    rows = buffer[: to.numel() * n].view(-1, n)
    start = torch.arange(b, device=to.device)[:, None] * n
    torch.index_select(table.view(-1, n), 0, (to + start).flatten(), out=rows)
    return rows.view(b, -1, n).amax(1)


def without_duplicates_naive(similarity: Sequence[Sequence[float]], among: Sequence[int], count: int) -> list[int]:
    """The same for one item, as the code goes on: the reference that `without_duplicates` is tested against."""
    left = list(among)
    while (drop := min(STEP, len(left) - count, (len(left) + 1) // 2)) > 0:
        even, odd = left[::2], left[1::2]
        closest = {i: max(similarity[i][j] for j in odd) for i in even}
        left = sorted(even, key=lambda i: -closest[i])[drop:] + odd
    return left
