"""A round of ToMe in a block of the vision tower: the most similar pairs become one, as means by size."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.reduction import Reduction
from winnow.core.select import count_broken
from winnow.core.step import Reduce, State
from winnow.core.view import View
from winnow.parts.bipartite import bipartite
from winnow.parts.cosine import unit
from winnow.parts.merge import weights_by_size
from winnow.parts.tower import prefix


def most_pairs(view: View) -> int:
    """Pairs that can merge: each has one token in an even place and one in an odd place."""
    return (view.n - prefix(view)) // 2


def pairs_to(view: View, left: int, block: int, blocks: int, method: str) -> int:
    """Pairs that merge in a block so that `left` patches are left behind the last, by steps as even as can be.

    Raises:
        WinnowError: halving in every block leaves more.
    """
    start = view.n_visual
    if left << blocks < start:
        least = -(-start >> blocks)
        raise WinnowError(f"{method}: left={left} of {start}; allowed in {blocks} blocks: {least} and more.")
    # No more may be left over than the blocks behind this one can halve.
    goal = min(start - (start - left) * (block + 1) // blocks, left << (blocks - 1 - block))
    return min(most_pairs(view), max(0, view.n - prefix(view) - goal))


def merge_pairs(
    view: View,
    state: State,
    keys: Float[Tensor, "b n d"],
    r: int,
    *,
    turn: Int[Tensor, " n"] | None = None,
    proportional: bool = True,
    by_likeness: bool = False,
) -> tuple[Reduce, State]:
    """Merge r pairs; `state.summed["size"]` holds how many tokens of the tile each one stands for.

    Args:
        keys: by which tokens are alike.
        turn: the tokens in the order in which they are even and odd; by default their own.
        proportional: whether a token weighs by its size as a key of later blocks.
        by_likeness: see `bipartite`.
    """
    places = torch.arange(view.n, device=view.tokens.device)
    x, broken = unit(keys)
    count_broken(broken, view)
    if r == 0:
        return Reduce(Reduction.select(places.expand(view.b, -1), view.n)), state
    turn = places if turn is None else turn
    found = bipartite(x, r, turn, bool(prefix(view)), broken=broken, by_likeness=by_likeness)
    size = state.summed.get("size", x[0].new_ones(view.b, view.n))
    weight, total = weights_by_size(found.cluster, size, view.n - r)
    reduction = Reduction.assign(
        found.cluster, weight, m=view.n - r, representative=found.representative, ordered=False
    )
    after = replace(state, summed={**state.summed, "size": size})
    return Reduce(reduction, log_bias=total.log() if proportional else None), after
