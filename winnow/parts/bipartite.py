"""Bipartite soft matching: each even token looks for the most similar odd one, and the best pairs become one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.select import ranked
from winnow.parts.cosine import product


class Matching(NamedTuple):
    """Who becomes what.

    Attributes:
        cluster: `[b, n]` the output of each token. The even tokens that stay come first, then all odd ones.
        representative: `[b, n − r]` the token that each output stands for: of a pair, the odd one.
    """

    cluster: Int[Tensor, "b n"]
    representative: Int[Tensor, "b m"]


def bipartite(
    keys: list[Float[Tensor, "n d"]],
    r: int,
    turn: Int[Tensor, " n"],
    first_stays: bool = False,
    *,
    broken: Bool[Tensor, "b n"] | None = None,
    by_likeness: bool = False,
) -> Matching:
    """Merge the r even tokens that are most like an odd one. Several may go to the same.

    Ties go to the lowest index; no host read. A table of N/2 × N/2 for each item.

    Args:
        keys: of unit length, of each item; two tokens at least.
        r: at most the number of even tokens, less one where the first stays.
        turn: the tokens in the order in which they are even and odd.
        first_stays: whether the first in this order takes no part ([CLS]).
        broken: tokens that merge only when no others are left.
        by_likeness: leave the even tokens that stay in the order of falling likeness, unless the first stays.
    """
    even, odd = turn[::2], turn[1::2]
    likeness = product([k[even] for k in keys], [k[odd] for k in keys])
    if broken is not None:
        likeness.masked_fill_(broken[:, odd][:, None], torch.finfo(likeness.dtype).min)
        likeness.masked_fill_(broken[:, even][..., None], torch.finfo(likeness.dtype).min)
    if first_stays:
        likeness[:, 0] = -torch.inf
    best, partner = likeness.max(-1)
    stays = ranked(best)[:, r:]
    stays = stays if by_likeness and not first_stays else stays.sort(1).values
    kept = torch.arange(stays.shape[1], device=turn.device)
    cluster = best.new_empty(len(keys), len(turn), dtype=torch.int64)
    cluster[:, even] = (partner + len(kept)).scatter_(1, stays, kept.expand_as(stays))
    cluster[:, odd] = torch.arange(len(odd), device=turn.device) + len(kept)
    return Matching(cluster, torch.cat([even[stays], odd.expand(len(keys), -1)], 1))


def bipartite_naive(likeness: Sequence[Sequence[float]], r: int, first_stays: bool = False) -> list[list[int]]:
    """The outputs of one item as lists of tokens, its representative first: what `bipartite` is tested against.

    Args:
        likeness: of every token to every other.
    """
    n = len(likeness)
    evens, odds = range(0, n, 2), range(1, n, 2)
    seeking = [a for a in evens if a > 0 or not first_stays]
    partner = {a: max(odds, key=lambda b, a=a: likeness[a][b]) for a in seeking}  # type: ignore[misc]
    merged = sorted(seeking, key=lambda a: -likeness[a][partner[a]])[:r]
    return [[a] for a in evens if a not in merged] + [
        [b, *(a for a in sorted(merged) if partner[a] == b)] for b in odds
    ]
