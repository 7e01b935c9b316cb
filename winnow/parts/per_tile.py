"""The tiles of an item: how many tokens are left of each, quantiles in each, and a total dealt over them by weights."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.select import rank_of
from winnow.core.tiles import n_tiles, tile_of
from winnow.core.view import View


def count_in_tile(view: View, among: Bool[Tensor, "b n"] | None = None) -> Int[Tensor, "b t"]:
    """How many tokens of the view lie in each tile of the layout; `among`: of these alone."""
    ones = torch.ones_like(view.ids) if among is None else among.long()
    return sum_in_tile(ones, view)


def sum_in_tile(values: Tensor, view: View) -> Tensor:
    """`[b, t]` the sums of `[b, N]` over each tile."""
    return values.new_zeros(view.b, n_tiles(view.layout)).scatter_add_(1, tile_of(view), values)


def quantile_in_tile(values: Float[Tensor, "b n"], q: float, view: View) -> Float[Tensor, "b t"]:
    """The q-quantile of each tile, interpolated; of a tile of which nothing is left, some value of its neighbour."""
    tile, sizes = tile_of(view), count_in_tile(view)
    order = values.sort(dim=1, stable=True).indices
    order = order.gather(1, tile.gather(1, order).sort(dim=1, stable=True).indices)  # tile by tile, ascending
    at = (sizes - 1).clamp_min(0) * q
    first = sizes.cumsum(1) - sizes
    low, high = (values.gather(1, order.gather(1, (first + x.long()).clamp_max(view.n - 1))) for x in (at, at.ceil()))
    return torch.where(low == high, low, low + (high - low) * (at - at.floor()).to(low.dtype))  # also where both are ∞


def apportion(total: int, weights: Tensor, sizes: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """`total` (or all there is) over groups in proportion to their weights, none above its size.

    What a full group cannot take goes to the others in proportion; what is left by rounding down, one by one to the
    largest remainders, the first among equals. A group of weight 0 takes part when all others are full. No host read.
    """
    wide = weights.double()
    wide = wide.clamp_min(1e-12).maximum(wide.amax(1, keepdim=True) * 1e-9)
    left = sizes.sum(1, keepdim=True).clamp_max(total)
    # Groups fill in the order of size per weight. The first level at which none of the rest is full is the one.
    fills, order = (sizes / wide).sort(dim=1, stable=True)
    ordered, weight = sizes.gather(1, order), wide.gather(1, order)
    levels = (left - ordered.cumsum(1) + ordered) / weight.flip(1).cumsum(1).flip(1)
    enough = levels <= fills
    level = levels.gather(1, enough.to(torch.uint8).argmax(1, keepdim=True))
    exact = torch.where(enough.any(1, keepdim=True), wide * level, torch.inf).minimum(sizes.double())
    whole = exact.floor().long()
    rest = (exact - whole).masked_fill(whole >= sizes, -1)
    return whole + (rank_of(rest) < left - whole.sum(1, keepdim=True)).long()


def apportion_naive(total: int, weights: list[float], sizes: list[int]) -> list[int]:
    """The same for one item, as one would do it on paper: the reference that `apportion` is tested against."""
    total = min(total, sum(sizes))
    most = max([*weights, 0])
    weights = [max(w, most * 1e-9, 1e-12) for w in weights]
    exact: dict[int, float] = {}
    while len(exact) < len(sizes):
        rest = [i for i in range(len(sizes)) if i not in exact]
        level = (total - sum(exact.values())) / sum(weights[i] for i in rest)
        full = [i for i in rest if weights[i] * level > sizes[i]]
        exact |= {i: float(sizes[i]) for i in full} if full else {i: weights[i] * level for i in rest}
    whole = [min(math.floor(exact[i]), size) for i, size in enumerate(sizes)]
    by_rest = sorted(range(len(sizes)), key=lambda i: (whole[i] >= sizes[i], whole[i] - exact[i], i))
    for i in by_rest[: total - sum(whole)]:
        whole[i] += 1
    return whole
