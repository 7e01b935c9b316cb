"""PruneVid (arXiv 2412.16117): merge what stands still in a video and what is alike, then keep what the question sees.

Looks at: the projected tokens; the attention of all text behind the video in one LM layer, the most of any head and
word. Cost: in each group of a frame's tokens a P × P table, O(V · P · D); for the text's rows O(words · S · D). Counts
depend on the video: host reads.

Frames are cut into segments by density peaks of their means. Places whose tokens stay alike in a segment become their
mean over time; these, and the other tokens of each frame, are merged into the share `beta` of them by density peaks.
Behind an LM layer, 10 of 32 in the paper and at the same share of any depth, each group keeps the share `alpha` that
the text sees most, and the caches up to it are cut, too. A picture is a video of one frame: nothing stands still.
Departs from the paper: no group is left without a token (`least=1`).
Departs from the released code: `least=0` leaves small groups with none. Outputs stand in the order of the video; in the
code those that stand still come first in their segment, and clusters in the order of their density (`order=density`).
It breaks ties at random, and fails for fewer than 7 frames. It numbers positions anew behind merging and keeps them
when it drops; `positions=compact` numbers anew in both.
"""

from typing import Annotated, Literal

import torch
from torch import Tensor

import winnow.contract as wn
from winnow.parts.cosine import unit
from winnow.parts.frames import frame_slots
from winnow.parts.segments import density_segments
from winnow.parts.still import groups_of, merged_groups, of_items

NEAREST = 7  # tokens, or frames, by which density is measured, the one itself among them


@wn.register("prunevid")
class PruneVid(wn.Method):
    """Merge what stands still and what is alike, and keep of each group what the text attends to.

    Args:
        temporal: segments for each frame, at most.
        tau: mean cosine of the tokens of a place over a segment above which it stands still.
        beta: share of a group's tokens that merging leaves.
        small: tokens up to which a group is not merged.
        alpha: share of a group's tokens that is kept behind `layer`.
        least: tokens that a group keeps at least.
        layer: the LM layer whose attention is read; default: see above.
        order: of what merging leaves.
        cache: whether layers up to `layer` decode with what is kept behind it.
    """

    temporal: wn.Share = 0.25
    tau: Annotated[float, wn.Between(-1)] = 0.8
    beta: wn.Share = 0.5
    small: wn.Count = 14
    alpha: wn.Share = 0.4
    least: wn.Count = 1
    layer: wn.Layer | None = None
    order: Literal["raster", "density"] = "raster"
    cache: bool = True

    pairwise = True
    across_frames = True
    identity = {"tau": 2.0, "beta": 1.0, "alpha": 1.0}
    released = {"least": 0, "order": "density", "positions": "compact"}

    def resolve(self, info: wn.ModelInfo):
        return (
            self if self.layer is not None else self.replace(layer=max(0, min(info.at_depth(10 / 32), info.depth - 2)))
        )

    def steps(self, info: wn.ModelInfo):
        merging, behind = wn.Step(wn.Point("projected"), self.merge), (self.layer or 0) + 1
        if info.depth == 1:  # there is no layer behind the only one
            return (merging,)
        peak = wn.TextPeak(behind - 1)
        cut = wn.Step(
            wn.Point("layers", info.lm_layer(behind)), lambda view, state: self.cut(view, state, peak), (peak,)
        )
        if not self.cache or "kv" not in info.points:
            return merging, cut
        return merging, cut, wn.KVStep(wn.Point("kv", behind), lambda view, state: wn.Follow(tuple(range(behind))))

    def merge(self, view: wn.View, state: wn.State):
        """Before the LM: each group of tokens becomes the means of its clusters, and is remembered."""
        frames, slot = frame_slots(view, "prunevid")
        broken = unit(view.tokens)[1]
        wn.count_broken(broken, view)
        lanes = [self._merged(*item, frames) for item in zip(view.tokens, slot, broken, strict=True)]
        group, *maps = map(list, zip(*lanes, strict=True))
        raster = self.order == "raster"
        merged = of_items(*maps, ordered=raster)
        return wn.Reduce(merged, "keep" if raster else "drop"), wn.State(token={"group": torch.stack(group)})

    def _merged(self, tokens: Tensor, slot: Tensor, broken: Tensor, frames: int) -> tuple[Tensor, ...]:
        """What becomes of one item, in the order of its tokens; outputs in the order of the video or of the groups."""
        order = slot.argsort()
        x, bad = (values[order].unflatten(0, (frames, -1)) for values in (tokens, broken))
        means = x.float().masked_fill(bad[..., None], 0).mean(1)
        segment = density_segments(means[None], int(frames * self.temporal), NEAREST)[0].tolist()
        found = merged_groups(x, bad, groups_of(x, segment, self.tau, bad), self.beta, NEAREST, self.small)
        group, target, weight, anchor = found
        anchor = order[anchor]
        rank = torch.arange(len(anchor), device=slot.device)
        if self.order == "raster":
            anchor, by = anchor.sort()
            rank = torch.empty_like(by).scatter(0, by, rank)
        return group[slot], torch.where(target < 0, -1, rank[target])[slot], weight[slot], anchor

    def cut(self, view: wn.View, state: wn.State, peak: wn.TextPeak) -> wn.Reduction:
        """Behind a layer: of each group, what its text attends to most."""
        score = wn.comparable(view[peak], view)
        group = state.token.get("group", torch.zeros_like(view.ids))
        held = torch.zeros(view.b, view.n_visual + 1, device=group.device).double()
        held.scatter_add_(1, group, torch.ones_like(group).double())
        quota = torch.maximum((held * self.alpha).floor(), held.clamp_max(self.least)).gather(1, group)
        return wn.Reduction.select(wn.rank_in_tile(score, group) < quota)  # a host read, once more
