"""FastVID (arXiv 2503.11187): cut a video at its scenes, keep what is seen most, merge the rest into dense anchors.

Looks at: the projected tokens, and the attention of the tower's feature block ([CLS], where there is one, else of all
queries). Cost: in each frame of P tokens a P × P table, O(V · P · D); then O(V · anchors · D).

Neighbouring frames less alike than `tau` are cut apart, and the least alike ones until there are `segments`. Each frame
keeps its most attended tokens. The rest of the budget are anchors, in the last frame of a segment and every few before
it: dense tokens far from denser ones, into which all other tokens of the segment are merged, once for each such frame.
A picture is a video of one frame.
Departs from the paper: frames are compared by the means of their tokens, and tokens by the tower's attention, as models
are loaded without the pooling head of SigLIP. What is over where numbers do not divide goes to the first frames and to
the last anchors, so that the count is exact. Anchors that would not fit into their frame lie closer to each other.
Departs from the released code: `head=true` takes what the pooling head gives, as its version for LLaVA-OneVision; that
for Qwen2.5-VL takes means, too. It loses what is over, and where that leaves a frame of a segment as many anchors as a
segment of one frame has, they get tokens of their own frame only (`remainder=lost`). It breaks ties at random. The ways
of its other versions to spread what is over, and to skip frames, are not here. Positions are kept.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

import winnow.contract as wn
from winnow.parts.anchors import anchor_quotas, best_of_frames, density_of_rest, per_frame, with_anchors
from winnow.parts.cosine import unit
from winnow.parts.frames import frame_slots
from winnow.parts.segments import cut_where_unlike, neighbour_cosine

NEAREST = 4  # tokens by which density is measured, the token itself among them


@dataclass(frozen=True)
class ProbeAttention(wn.VisionSignal):
    """What the probe of SigLIP's pooling head gives each token: `[b, N]`. Models are loaded without this head."""

    def site(self, info: wn.ModelInfo) -> wn.Site:
        raise wn.UnsupportedError(f"{info.model} is loaded without its tower's pooling head; use head=false.")


@dataclass(frozen=True)
class PooledFrames(ProbeAttention):
    """What SigLIP's pooling head makes of each frame: `[b, T, C]`."""

    per: ClassVar[Literal["token", "item"]] = "item"

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, 1, 16, generator=generator)


@wn.register("fastvid")
class FastVID(wn.Method):
    """Keep what is seen most of each frame, and merge each scene's other tokens into dense ones of a few frames.

    Args:
        keep: content tokens of the item, split equally over its frames.
        segments: there are at least as many, as far as there are frames.
        tau: cosine of neighbouring frames below which there is a cut.
        context: share of the budget that are anchors.
        every: frames from one with anchors to the next.
        beta: what an anchor counts at least beside the mean of what is merged into it.
        remainder: what is over where numbers do not divide.
        head: whether frames and tokens are judged by SigLIP's pooling head (on tensors).
    """

    keep: wn.Budget = wn.Budget("10%")
    segments: Annotated[int, wn.Between(1)] = 8
    tau: Annotated[float, wn.Between(-1, 2)] = 0.9
    context: wn.Share = 0.4
    every: Annotated[int, wn.Between(1)] = 4
    beta: wn.Share = 0.6
    remainder: Literal["spread", "lost"] = "spread"
    head: bool = False

    rounding = "floor"
    pairwise = True
    across_frames = True
    released = {"remainder": "lost", "head": True, "positions": "keep"}

    def signals(self):
        return (ProbeAttention(), PooledFrames()) if self.head else (wn.VisionAttention(query="auto"),)

    def reduce(self, view: wn.View) -> wn.Reduction:
        keep = self.keep.of(view)
        if keep >= view.n:
            return wn.top_k(view.ids.new_zeros(view.ids.shape), keep)
        frames, slot = frame_slots(view, "fastvid")
        order, places, exact = slot.argsort(1), view.n // frames, self.remainder == "spread"
        budgets = wn.split_evenly(keep, [places] * frames) if exact else [max(1, keep // frames)] * frames
        context = tuple(int(budget * self.context) for budget in budgets)
        salient = tuple(budget - anchors for budget, anchors in zip(budgets, context, strict=True))
        x, broken = unit(view.tokens)
        wn.count_broken(broken, view)
        look = wn.comparable(view[self.signals()[0]], view).masked_fill(broken, -torch.inf)
        look, broken = (values.gather(1, order).unflatten(1, (frames, places)) for values in (look, broken))
        seen = best_of_frames(look, per_frame(salient, slot.device))
        if not any(context):
            return wn.Reduction.select(seen.flatten(1).gather(1, slot), counts=(sum(salient),) * view.b)
        tokens = view.tokens.gather(1, order[..., None].expand_as(view.tokens)).unflatten(1, (frames, places))
        vectors = view[PooledFrames()] if self.head else tokens.float().masked_fill(broken[..., None], 0).mean(2)
        if vectors.shape[1] != frames:
            raise wn.WinnowError(
                f"fastvid: {vectors.shape[1]} vectors of frames, and {frames} frames; give one of each."
            )
        segment = cut_where_unlike(neighbour_cosine(vectors), self.tau, self.segments)
        room, each = places - max(salient), per_frame(context, slot.device)
        quota = anchor_quotas(segment, each, self.every, room, exact)
        anchor = best_of_frames(density_of_rest(tokens, look, broken, salient, NEAREST), quota)
        # What is lost depends on the segments.
        counts = (keep,) * view.b if exact else tuple((seen | anchor).flatten(1).sum(1).tolist())
        alone = None if exact else quota == each
        return with_anchors(
            x, slot, seen, anchor, seen | broken, segment, counts, salient=sum(salient), beta=self.beta, alone=alone
        )
