"""HoliTom (arXiv 2505.21334): merge what stays the same in a video over time, then in space, and once more in the LM.

Looks at: tokens behind the projector, attention received in the feature block, one attention row of an LM layer. Cost:
O(V · D + T² · N), and DPC-KNN over the static places of each window; O(V² · D / 4) in the LM.

A place of the picture is static from a frame to the next where the cosine of its tokens is above tau. Frames are cut
into the windows that save most, where what is static in a window is stored once. These places are averaged over time
and merged by density peaks, the others of each frame ranked by attention, until the budget is met. Before layer 18 of
28 the last token of the prompt ranks what is left, and the lower half goes into the most similar of the upper half. A
picture is one frame, ranked by attention alone. Where much is static, fewer tokens are left than the budget allows.
Departs from the paper: the budget is met in total, and what comes together in the LM is a mean of all.
Departs from the released code: there each frame and window rounds by itself (`exact=false`), and tokens come together
in the LM one after the other, by halves (`merge=halving`). Tokens stay in the order of frames and places, as in the
code's form with newlines; its other form puts the static tokens of a window first (`order=window`). Densities have no
noise. The share D of dynamic tokens that are merged is 0, others raise there. Positions are kept by default; the code
numbers them anew before the LM and keeps them in it, where `positions=compact` numbers anew in both.
"""

from typing import Annotated, Literal

import torch

import winnow.contract as wn
from winnow.parts.cosine import unit
from winnow.parts.frames import frame_grid, whole_clip
from winnow.parts.nearest_merge import into_nearest
from winnow.parts.segments import most_saved
from winnow.parts.static_merge import each_rounded, groups_of, in_total, shortened, stacked, unchanged


@wn.register("holitom")
class HoliTom(wn.Method):
    """Merge static places of a video in time and space, rank the others, and merge once more in the LM.

    Args:
        keep: content tokens that enter the LM, as far as merging in time leaves as many.
        tau: cosine above which a place stays the same (the authors take 0.65 to keep 10 %).
        centre: what a density peak counts beside the mean of those merged into it; none: as much as each of them.
        near: nearest tokens by which density is measured.
        longest: frames of a window at most.
        exact: whether the budget is met in total.
        order: by frame and `place`, or by `window`, static tokens first.
        layer: the LM layer before which tokens are merged once more; default: at 18/28 of the depth.
        inner: of the tokens that entered the LM, those that are left there; 100%: none are merged in the LM.
        merge: what comes together there: a `mean` by how many tokens each stands for, or by `halving`.
        attention: what ranks the tokens of a frame.
    """

    keep: wn.Budget = wn.Budget("15%")
    tau: Annotated[float, wn.Between(-1, 2)] = 0.8
    centre: wn.Share | None = 0.6
    near: Annotated[int, wn.Between(1)] = 7
    longest: Annotated[int, wn.Between(1)] = 1024
    exact: bool = True
    order: Literal["place", "window"] = "place"
    layer: wn.Layer | None = None
    inner: wn.Budget = wn.Budget("50%")
    merge: Literal["mean", "halving"] = "mean"
    attention: wn.VisionAttention = wn.VisionAttention(query="all")

    rounding = "half-even"
    identity = {"keep": "100%", "tau": 2.0, "inner": "100%"}
    released = {"exact": False, "order": "window", "merge": "halving", "positions": "compact"}
    pairwise = True
    across_frames = True

    def check(self) -> None:
        if self.layer == 0 and self.inner.share(2**30) < 1:
            raise wn.WinnowError("holitom: layer=0 has no layer before it; allowed: 1 and more, or inner=100%.")

    def at_budget(self, budget, content: int):
        """Twice the budget enters the LM, where there is as much, and is merged down to it."""
        budget = wn.Budget.parse(budget).rounded(self.rounding)
        left = budget.of(content)
        if budget.is_count:
            return self.replace(keep=min(content, 2 * left), inner=left)
        enter = min(1.0, 2 * float(budget.share(content)))
        share = min(100.0, 100 * (left + 0.25) / wn.Budget(f"{100 * enter:.8f}%", rounding=self.rounding).of(content))
        return self.replace(keep=f"{100 * enter:.8f}%", inner=f"{share:.8f}%")

    def resolve(self, info: wn.ModelInfo):
        layer = max(1, info.at_depth(18 / 28)) if self.layer is None else info.lm_layer(self.layer)
        return super().resolve(info).replace(layer=layer)

    def steps(self, info: wn.ModelInfo):
        outer = wn.Step(wn.Point("projected"), self._outer, (self.attention,))
        if not self.layer or self.inner.share(2**30) == 1:
            return (outer,)
        return outer, wn.Step(wn.Point("layers", self.layer), self._inner, (wn.LMAttention(self.layer - 1),))

    def _outer(self, view: wn.View, state: wn.State):
        return wn.Reduce(self.reduce(view)), wn.State(summed={"size": torch.ones_like(view.ids, dtype=torch.float32)})

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The map of what happens before the LM."""
        x, broken = unit(view.tokens)
        wn.count_broken(broken, view)
        score = wn.comparable(view[self.attention], view).masked_fill(broken, -torch.inf)
        grid = frame_grid(view.layout, view.ids.device)
        if grid.frames == 1:
            return wn.top_k(score, self.keep.of(view))
        at = whole_clip(view, self.slug).slot.argsort(1)
        same = unchanged(x, at, grid.frames, self.tau, broken)
        videos = []
        for lane, segment in enumerate(most_saved(same, self.longest)[0].tolist()):
            groups = groups_of(same[lane], segment)
            own, rank = (values[lane, at[lane]].unflatten(0, (grid.frames, -1)) for values in (view.tokens, score))
            share = float(self.keep.share(view.n))
            counts = in_total(groups, self.keep.of(view)) if self.exact else each_rounded(groups, share, view.n)
            videos.append(shortened(groups, counts, own, rank, self.near, self.centre))
        return stacked(videos, at, self.order == "place")

    def _inner(self, view: wn.View, state: wn.State) -> wn.Reduction:
        size = state.summed.get("size", torch.ones_like(view.ids, dtype=torch.float32))
        return into_nearest(
            view, view[wn.LMAttention((self.layer or 1) - 1)], self.inner.of(view.n_lm), self.merge, size
        )
