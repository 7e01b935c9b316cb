"""VFlowOpt (arXiv 2508.05211): merge what globally attended patches look past, then cut in the LM by the same score.

Looks at: the rows of those patches of the feature block that receive most attention; pixels, where `alpha` is not 0.
Cost: the attention of one block, O(V² · D), streamed; O(V · D) for each global patch, at most V / threshold of them.

The lowest tokens before the LM become, cell by cell, their mean, weighed by score, in the place of the highest.
Departs from the paper: merging goes on until just as many tokens are left as the share says; the paper merges as many
more as a picture has cells. Where no patch exceeds the threshold, that with most attention is global.
Departs from the released code: it counts so, and newlines with the tokens (`exact=false`); it leaves single tiles
alone, and its entropy is of normalised values that wrap around.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

import winnow.contract as wn
from winnow.parts.attended import global_rows, grey_entropy, softmax_in_groups
from winnow.parts.cells import cells_of, merge_lowest

PLANS = {
    "50%": (28.68, 11.76, 0.723, 0.749, 0.487),
    "25%": (34.76, 15.58, 0.265, 0.983, 0.877),
    "10%": (39.26, 17.39, 0.117, 1.0, 0.601),
}


@dataclass(frozen=True)
class GlobalAttention(wn.VisionSignal):
    """Mean attention row of the patches that receive more than `threshold` times the mean: `[b, N]`."""

    threshold: float = 34.76

    def read(self, seen: wn.TowerAttention):
        received = wn.comparable(wn.VisionAttention(self.layer, query="all").read(seen))
        return global_rows(*seen.logits(), received, self.threshold)[:, seen.prefix :]


@dataclass(frozen=True)
class PixelEntropy(wn.Signal):
    """Entropy of each token's part of the picture, in bits: `[b, N]`; pixels are taken to lie from −1 to 1."""

    def site(self, info: wn.ModelInfo):
        if info.mrope:  # whose pixels are laid out in another way
            raise wn.UnsupportedError("the entropy of its pixels cannot be read yet; leave alpha at 0.")
        return wn.Site("pixels")

    def read(self, seen: wn.Pixels):
        return grey_entropy(seen.patches.float().unflatten(1, (3, -1)).mean(1) / 2 + 0.5)


@wn.register("vflowopt")
class VFlowOpt(wn.Method):
    """Merge the lowest tokens cell by cell before the LM, and cut twice inside it, by one score.

    Args:
        plan: of the released ones, whose numbers hold where no others are given: its mean share of tokens over layers.
        before, middle, late: shares of the tokens at hand that stay before the LM, at 9/28 and at 18/28 of its depth.
        left: content tokens that the last cut leaves, instead of its share.
        threshold: times the mean attention that a global patch receives.
        cell: side of a cell, in tokens.
        alpha: weight of the entropy of pixels, softmaxed over a tile.
        exact: whether the share before the LM is met exactly; else the number of tokens depends on the picture.
    """

    plan: Literal["50%", "25%", "10%"] = "25%"
    before: wn.Share | None = None
    middle: wn.Share | None = None
    late: wn.Share | None = None
    left: wn.Budget | None = None
    threshold: Annotated[float, wn.Between(0)] | None = None
    cell: Annotated[float, wn.Between(1)] | None = None
    alpha: Annotated[float, wn.Between(-1, 1)] = 0.0
    exact: bool = True
    rounding = "half-even"
    identity = {"before": 1.0, "middle": 1.0, "late": 1.0}
    released = {"exact": False, "positions": "keep"}

    def at_budget(self, budget, content: int):
        """The shares to one power, so that they multiply to the budget."""
        left, (_, _, *shares) = wn.Budget.parse(budget).rounded(self.rounding), self.numbers()
        power = math.log(left.share(content)) / math.log(min(0.999, math.prod(shares)))
        before, middle, late = (round(share**power, 6) for share in shares)
        return self.replace(left=left, before=before, middle=middle, late=late)

    def numbers(self):
        given = self.threshold, self.cell, self.before, self.middle, self.late
        return tuple(own if mine is None else mine for mine, own in zip(given, PLANS[self.plan], strict=True))

    def signals(self):
        return (GlobalAttention(threshold=self.numbers()[0]), *((PixelEntropy(),) if self.alpha else ()))

    def steps(self, info: wn.ModelInfo):
        first, second = info.at_depth(9 / 28), info.at_depth(18 / 28)  # on a very shallow LM one cut, the second
        cuts = [lambda view, state: self.cut(view, state, 3)] * (first < second) + [self.cut]
        points = wn.Point("projected"), *(wn.Point("layers", layer) for layer in sorted({first, second}))
        return tuple(wn.Step(p, run, self.signals()) for p, run in zip(points, [self.merge, *cuts], strict=True))

    def score(self, view: wn.View):
        score, *bits = (wn.comparable(view[signal], view) for signal in self.signals())
        return score + self.alpha * softmax_in_groups(bits[0], wn.tile_of(view)) if bits else score

    def merge(self, view: wn.View, state: wn.State):
        broken, side = ~view.tokens.isfinite().all(-1), self.numbers()[1]
        wn.count_broken(broken, view)
        score, cells = self.score(view).masked_fill(broken, -torch.inf), cells_of(view, side)
        stay, count = self._stay(view, 2)
        more = None if self.exact else int(count / side**2)
        return merge_lowest(score, cells, view.n - stay, more), wn.State(token={"score": score})

    def cut(self, view: wn.View, state: wn.State, which: int = 4):
        score = state.token["score"] if "score" in state.token else self.score(view)
        return wn.top_k(score, self._stay(view, which)[0], view)

    def _stay(self, view: wn.View, which: int) -> tuple[int, int]:
        count = view.n + (0 if self.exact else view.layout.n_separators)
        stay, left = view.n - round(count * (1 - self.numbers()[which])), self.left and self.left.of(view)
        return min(view.n, left if left and which == 4 else max(left or 1, stay)), count
