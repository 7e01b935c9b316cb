"""Visual Context Window Extension (arXiv 2409.20018): positions stretched by the visual tokens, most frames pooled.

Looks at: nothing. Cost: none of the order of a layer.

Pooling: frames come in groups; the first keeps what the model gives, the others are made smaller by bilinear
interpolation, a stride for each place in the group (`strides`). Of a group of four frames of 14 × 14 tokens 343 of 784
are left. Stretching: s is the number of visual tokens that reach the language model over the `window` of its training,
at least 1. Pairs of rotary dimensions that turn less than once within the window have their frequency divided by s,
those that turn more than 32 times keep it, and cosines and sines are multiplied with 0.1 ln s + 1 (YaRN). It holds for
all tokens of the request, and for what is decoded after it. The two parts do not need each other: `strides=[1.0]` or
`window=none` leaves one out. A text in a request of its own, with no visual token, is read as ever.
Departs from the paper: details that are not in the abstract were taken from its descriptions, and not checked against
it: pooling acts behind the projector, the group of four and its strides are set here, and frames are as large as the
model gives them. A later turn is read with the s of the first one, and refused where it would need a larger one;
`scale` sets it in advance. Positions in three axes are not stretched: models with them are refused unless
`window=none`.
Departs from the released code: no code has been released.
"""

from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

import winnow.contract as wn
from winnow.parts.frames import frame_grid, frame_sides, frame_slots
from winnow.parts.resampled import in_groups


@wn.register("visual-context-window-extension")
class VisualContextWindowExtension(wn.Method):
    """Pool most frames of a group, and stretch rotary positions by the visual tokens of the request.

    Args:
        strides: of the frames of a group, in tokens that the model gives; frames beyond start the next group.
        window: visual tokens of a request of the model's training; none: positions are left as they are.
        scale: s, in the place of the one that follows from the request; then of every request.
    """

    strides: tuple[Annotated[float, wn.Between(1)], ...] = (1.0, 2.0, 2.0, 2.0)
    window: Annotated[int, wn.Between(1)] | None = 6272
    scale: Annotated[float, wn.Between(1)] | None = None

    identity = {"strides": (1.0,), "window": None}
    across_frames = True

    def reduce(self, view: wn.View) -> wn.Reduction:
        frames, device = frame_grid(view.layout, view.ids.device).frames, view.ids.device
        if frames == 1 or set(self.strides) == {1.0}:
            return wn.Reduction.select(torch.arange(view.n, device=device).expand(view.b, -1), view.n)
        order, sides = frame_slots(view, self.slug)[1].argsort(1), frame_sides(view.layout)
        if sides is None:
            raise wn.WinnowError(
                f"{self.slug} makes frames smaller that fill a grid of rows and columns, and those of this video do "
                "not; use strides=[1.0], which leaves them as they are."
            )
        source, target, weight, place = _edges(frames, sides, self.strides, device)
        m = place.shape[0]
        lanes = (view.b, -1)
        return wn.Reduction.edges(
            order[:, source], target.expand(lanes), weight.expand(lanes), n=view.n, m=m, representative=order[:, place]
        )

    def stretch(self, tokens: int) -> wn.Stretch | None:
        if self.window is None:
            return None
        scale = self.scale if self.scale is not None else max(1.0, tokens / self.window)
        return wn.Stretch(scale, self.window) if scale > 1 else None


@lru_cache(maxsize=64)
def _edges(
    frames: int, sides: tuple[int, int], strides: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = in_groups(frames, *sides, strides)
    source, target, place = (torch.from_numpy(x).to(device) for x in (found.source, found.target, found.place))
    return source, target, torch.from_numpy(found.weight).float().to(device), place
