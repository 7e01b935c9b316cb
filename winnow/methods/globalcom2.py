"""GlobalCom² (arXiv 2501.05179): the thumbnail says how much each crop may keep, and helps to choose it.

Looks at: the [CLS] row of the last vision block, before its softmax, in the thumbnail and in each crop. Cost: O(V · D)
for the row, then O(V log V).

The thumbnail keeps the share R of its tokens, those with the highest logits. Each crop keeps R · (1 + p − mean p) of
its own, where p is the softmax, at a temperature, of the sum of the thumbnail's logits over its part of an equal
partition. They are ranked by their own logits plus those of the thumbnail at the same place (bilinear), each at length
1 over the crop. An item without crops keeps its tokens with the highest logits.
Departs from the paper: by default the item keeps exactly its budget, for which ratios are weights of tiles.
Departs from the released code: budgets are exact by default; in the code each tile keeps its ratio, rounded down
(`exact=false`), and share 1 is not everything, because crops below the mean lose tokens. It lists the tokens of the
thumbnail by score, puts those of a padded crop at wrong places of the mosaic, and keeps the newlines of padded rows;
here all stand where they stood, and padded rows have none. It leaves an item without crops whole. Positions are kept
by default, as for all methods of winnow; the code numbers them anew.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

import winnow.contract as wn
from winnow.parts.mosaic import mosaic_of
from winnow.parts.per_tile import apportion, count_in_tile, sum_in_tile


@wn.register("globalcom2")
class GlobalCom2(wn.Method):
    """Keep of each crop as much as the thumbnail finds there, and what both find in it.

    Args:
        keep: content tokens of the item; as a share, the ratio R.
        row: what [CLS] sees; `VisionAttention(layer=-1)` is what the softmax makes of it.
        temperature: of the softmax over crops.
        exact: whether the item keeps exactly its budget, or each tile its own ratio, rounded down.
    """

    keep: wn.Budget = wn.Budget(0.25)
    row: wn.ClsLogits | wn.VisionAttention = wn.ClsLogits(layer=-1)
    temperature: Annotated[float, wn.Between(1e-6)] = 10.0
    exact: bool = True

    released = {"exact": False, "positions": "compact"}

    def reduce(self, view: wn.View) -> wn.Reduction:
        given, keep = wn.comparable(view[self.row], view), self.keep.of(view)
        picture = mosaic_of(view.layout, view.ids.device)
        if picture is None:
            return wn.top_k_per_tile(given, keep, view)
        broken, tile = ~given.isfinite(), wn.tile_of(view)
        own, at = given.masked_fill(broken, 0), picture.place[view.ids]
        seen = _thumbnail(own, at.masked_fill(broken | (tile > 0), len(picture.crop)), len(picture.crop))
        sizes = count_in_tile(view)
        wanted = self._ratios(seen, picture.crop, view) * sizes
        quota = apportion(keep, wanted, sizes) if self.exact else _floor(wanted)
        grids = seen.unflatten(1, picture.sides[0])[:, None]
        there = interpolate(grids, picture.sides[1], mode="bilinear", align_corners=False).flatten(1)
        there = there.gather(1, at.masked_fill(tile == 0, 0)).masked_fill(tile == 0, 0)
        score = torch.where(tile == 0, own, _at_length_1(own, view) + _at_length_1(there, view))
        kept = wn.rank_in_tile(score.masked_fill(broken, -torch.inf), tile) < quota.gather(1, tile)
        return wn.Reduction.select(kept, counts=(min(keep, view.n),) * view.b if self.exact else None)

    def _ratios(
        self, seen: Float[Tensor, "b cells"], crop: Int[Tensor, " cells"], view: wn.View
    ) -> Float[Tensor, "b t"]:
        """The share that each tile keeps, the thumbnail first."""
        share = float(self.keep.share(view.n_visual))
        sums = seen.new_zeros(view.b, wn.n_tiles(view.layout) - 1, dtype=torch.float64)
        sums.scatter_add_(1, crop.expand(view.b, -1), seen.double())
        powers = ((sums - sums.amax(1, keepdim=True)) / self.temperature).exp()
        p = powers / (powers.sum(1, keepdim=True) + 1e-8)  # as in the code: a ratio that is round is rounded down
        ratios = (share * (1 + p - p.mean(1, keepdim=True))).clamp_max(1)
        return torch.cat([torch.full_like(p[:, :1], share), ratios], 1)


def _floor(wanted: Float[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Rounded down; one of the thumbnail at least."""
    return torch.cat([wanted[:, :1].clamp_min(1), wanted[:, 1:]], 1).long()


def _thumbnail(own: Float[Tensor, "b n"], cell: Int[Tensor, "b n"], cells: int) -> Float[Tensor, "b cells"]:
    """Values on the grid of the thumbnail; where a token is broken or gone, the mean of the others."""
    grid, known = (
        own.new_zeros(own.shape[0], cells + 1).scatter_(1, cell, x)[:, :cells] for x in (own, torch.ones_like(own))
    )
    mean = grid.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
    return torch.where(known > 0, grid, mean)


def _at_length_1(values: Float[Tensor, "b n"], view: wn.View) -> Float[Tensor, "b n"]:
    """Values divided by their norm over the tile."""
    return values / sum_in_tile(values.square(), view).sqrt().clamp_min(1e-12).gather(1, wn.tile_of(view))
