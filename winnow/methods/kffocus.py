"""KFFocus (arXiv 2508.08989): keyframes as a codec sets them, and the tokens of other frames condensed.

Looks at: small pixels of the frames, or features that are handed over; the projected tokens. Cost: O(T² · D + V · D).

A frame is a keyframe when its mean cosine with the last keyframe, region by region, lies below `tau`, or after
`longest` frames. At `frames`, keyframes enter and up to `context` frames at equal distances behind each. Behind the
projector the same rule is asked of the tokens of those that entered, and each frame becomes so many tokens that a
keyframe has `ratio` times as many as one that repeats it; between them, in proportion to what is new. The tokens are
means over parts of the frame as square as their number allows. The item keeps exactly its budget.
Departs from the paper: only its abstract says what is done; all numbers, and how they are used, are of this file. It is
the training-free part, and that alone is this method: the paper's learned module stands on plain tensors in
`winnow/parts/spatiotemporal.py`, untrained, and no plan runs it. New is what differs from the last keyframe, not what
the question asks for. Frames get no times written before them; models that do so by themselves go on doing so.
Departs from the released code: no code has been released.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import winnow.contract as wn
from winnow.parts.condensed import means_of, parts_of
from winnow.parts.frames import frame_sides, frame_slots
from winnow.parts.keyframes import keyframes, likeness, regions_of, so_many_keyframes, with_context
from winnow.parts.per_tile import apportion


@wn.register("kffocus")
class KFFocus(wn.Method):
    """Choose keyframes and frames between them, and condense the tokens of frames that repeat.

    Args:
        keep: content tokens of the item, of the frames that entered.
        tau: mean cosine with the last keyframe below which a frame is one.
        longest: frames from one keyframe to the next at the most; 0: any number.
        sampling: whether frames are chosen, ahead of the processor; else all are condensed.
        keyframes: instead of `tau` and `longest`, exactly so many keyframes are chosen ahead of the processor.
        context: frames that enter between two keyframes.
        look: at what frames are chosen by; features are `handle.frames(video, features=…)`.
        ratio: tokens of a keyframe for one of a frame that repeats it.
    """

    keep: wn.Budget = wn.Budget("25%")
    tau: Annotated[float, wn.Between(-2, 2)] = 0.9
    longest: wn.Count = 16
    sampling: bool = True
    keyframes: wn.Budget | None = None
    context: wn.Count = 3
    look: Literal["pixels", "features"] = "pixels"
    ratio: Annotated[float, wn.Between(1)] = 16.0

    across_frames = True

    def steps(self, info: wn.ModelInfo):
        chosen = (wn.Step(wn.Point("frames"), self.choose),) if self.sampling and "frames" in info.points else ()
        return (*chosen, wn.Step(wn.Point("projected"), self._one_step))

    def choose(self, view: wn.FramesView, state: wn.State) -> wn.Action:
        """The frames that enter."""
        alike = likeness(self._seen(view))
        if self.keyframes is not None:
            found = so_many_keyframes(alike[0], self.keyframes.of(view))
        else:
            found = keyframes(alike, alike.new_full((1,), self.tau), self.longest)
        chosen = torch.tensor([with_context(found.key[0].tolist(), self.context)])
        return wn.Reduce(wn.Reduction.select(chosen, view.n))

    def _seen(self, view: wn.FramesView) -> Tensor:
        """`[1, t, r, d]` what frames are compared by: 4 × 4 regions of 4 × 4 colours around grey, and a constant."""
        if self.look == "features":
            if view.features is None:
                raise wn.WinnowError("kffocus:look=features needs them: handle.frames(video, features=…).")
            return view.features[:, :, None]
        small = adaptive_avg_pool2d(view.pixels[0].float().permute(0, 3, 1, 2) / 127.5 - 1, 16)
        cells = small.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 1, 3, 5)
        return torch.cat([cells.flatten(3).flatten(1, 2), torch.ones(len(small), 16, 1)], 2)[None]

    def reduce(self, view: wn.View) -> wn.Reduction:
        frames, slot = frame_slots(view, "kffocus")
        p, sides = view.n // frames, frame_sides(view.layout)
        if sides is None or p != sides[0] * sides[1]:
            sides = (1, p)  # what is no full grid stands in one row
        at = torch.arange(p, device=slot.device)
        places = torch.stack([at // sides[1], at % sides[1]], 1)
        wide = torch.promote_types(view.tokens.dtype, torch.float32)
        broken = ~view.tokens.to(wide).sum(-1).isfinite()
        wn.count_broken(broken, view)
        kept = min(self.keep.of(view), view.n)
        if kept == view.n:
            return wn.Reduction.select(torch.arange(view.n, device=slot.device).expand(view.b, -1), view.n)
        order = slot.argsort(1)
        bad = broken.gather(1, order).unflatten(1, (frames, -1))
        seen = [x[at].to(wide).unflatten(0, gone.shape) for x, at, gone in zip(view.tokens, order, bad, strict=True)]
        quota = self.quota(torch.stack(seen).masked_fill(bad[..., None], 0), regions_of(places, sides), kept)
        part = parts_of(quota.clamp_min(1)[..., None], places, sides) + (quota.cumsum(1) - quota)[..., None]
        return means_of(part.masked_fill(quota[..., None] == 0, -1).flatten(1).gather(1, slot), broken, kept)

    def quota(self, frames: Float[Tensor, "b t p d"], region: Int[Tensor, " p"], kept: int) -> Int[Tensor, "b t"]:
        """How many of `kept` tokens each frame becomes."""
        one_hot = torch.nn.functional.one_hot(region).T.to(frames.dtype)
        alike = likeness(torch.stack([one_hot @ own for own in frames]))
        key, repeats = keyframes(alike, alike.new_full((len(frames),), self.tau), self.longest)
        # What is new reaches its most at the threshold, or where the newest frame is.
        least = torch.cat([repeats[:, 1:], torch.full_like(repeats[:, :1], self.tau)], 1).amin(1, keepdim=True)
        new = ((1 - repeats) / (1 - least).clamp_min(1e-6)).clamp(0, 1)
        weight = torch.where(key, self.ratio, 1 + (self.ratio - 1) * new)
        return apportion(kept, weight, torch.full_like(key, frames.shape[2], dtype=torch.int64))
