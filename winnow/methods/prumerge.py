"""PruMerge (arXiv 2403.15388): keep the patches whose [CLS] attention is an outlier, and merge similar ones into them.

Looks at: the [CLS] row and the keys of the last vision block, both over all heads at once. Cost: O(k · V · D).

A tile keeps the patches whose attention lies above Q3 + 1.5 · IQR, or as many as a budget leaves. To each of them the
32 patches with the most similar keys are added, each times its attention; one more token sums up all that are not kept.
With `plus` (PruMerge+) patches of an even grid are kept too. Order: by attention, grid, sum; tile by tile.
Departs from the paper: nothing known.
Departs from the released code: at least one patch is kept, where the code keeps none or divides by zero; where none is
left over there is no sum; no patch comes twice. A budget counts the sum, and `plus` splits the rest 1 : 3. Newlines are
dropped. Positions are kept by default, as for all methods of winnow; the code numbers them anew.
"""

import torch
from jaxtyping import Int
from torch import Tensor

import winnow.contract as wn
from winnow.parts.cosine import unit
from winnow.parts.merge import mixture, sums_of_nearest
from winnow.parts.tower import tower_of

ROW, KEYS = wn.OneHeadAttention(-1), wn.WideKeys(-1)


@wn.register("prumerge")
class PruMerge(wn.Method):
    """Keep outliers of [CLS] attention, and merge similar patches into them.

    Args:
        keep: all outputs of the item, split equally over its tiles; none: the outliers decide, or a ratio.
        ratio: share of a tile's patches that is kept by attention, and by `plus` on a grid; 0: as many as are outliers.
        plus: whether patches of an even grid are kept too.
        neighbours: patches that are merged into one that is kept.
        normalize: whether outputs are means; else their length grows with the attention of what is merged.
    """

    keep: wn.Budget | None = None
    ratio: wn.Share = 0
    plus: bool = False
    neighbours: wn.Count = 32
    normalize: bool = False

    at = "features"
    separators = "drop"
    identity = None
    released = {"keep": None, "plus": False, "neighbours": 32, "positions": "compact"}

    def signals(self):
        return ROW, KEYS

    def reduce(self, view: wn.View) -> wn.Reduction:
        tower = tower_of(view, "prumerge")
        sizes = [len(patches) for patches in tower.patches]
        scores = wn.comparable(view[ROW], view).split(sizes, dim=1)
        keys, broken = unit(view[KEYS])
        wn.count_broken(broken, view)
        budgets = wn.split_evenly(self.keep.of(view), sizes) if self.keep else [None] * len(sizes)
        parts = [
            [
                (patches, *self._tile(score[lane], keys[lane][patches], broken[lane][patches], budget))
                for patches, score, budget in zip(tower.patches, scores, budgets, strict=True)
            ]
            for lane in range(view.b)
        ]
        return mixture(parts, view.n)

    def _tile(self, score: Tensor, keys: Tensor, broken: Tensor, budget: int | None) -> tuple[Tensor, Tensor]:
        """The outputs of a tile as weights of its patches, `[m, p]`, and the patch that each stands for, `[m]`."""
        order = wn.ranked(score[None])[0]
        kept = self._chosen(score, order, budget)
        weight = score.clamp_min(torch.finfo(score.dtype).tiny).masked_fill(broken, 0)
        rows = sums_of_nearest(kept, keys, weight, self.neighbours)
        if (budget is None or budget > 1) and len(kept) < len(score):
            rest = torch.ones_like(broken).scatter(0, kept, False)
            rows = torch.cat([rows, (weight * rest)[None]])
            kept = torch.cat([kept, order[rest[order].to(torch.uint8).argmax()[None]]])
        return (rows / rows.sum(1, keepdim=True) if self.normalize else rows), kept

    def _chosen(self, score: Tensor, order: Tensor, budget: int | None) -> Int[Tensor, " k"]:
        """The patches of a tile that are kept: the best, then those of the grid."""
        if budget is not None:
            count = min(budget, max(1, budget - 1))
            best = max(1, count // 4) if self.plus else count
            rest, grid = order[best:].sort().values, torch.arange(count - best, device=order.device)
            return torch.cat([order[:best], rest[grid * len(rest) // max(1, count - best)]])
        low, high = torch.quantile(score, score.new_tensor([0.25, 0.75]))
        share = self.ratio or max(1, int((score > high + 1.5 * (high - low)).sum())) / len(score)  # a host read
        top, step = order[: max(1, int(len(score) * share))], int(1 / share)
        first, step = (step // 2, step) if self.ratio else (0, max(1, step // 3))
        grid = torch.arange(first, len(score) - 1, step, device=order.device)
        return torch.cat([top, grid[~torch.isin(grid, top)]]) if self.plus else top
