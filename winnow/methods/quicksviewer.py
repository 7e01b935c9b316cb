"""Quicksviewer (arXiv 2504.15270): cut a video into cubes where it changes, and read each by the same few tokens.

Looks at: the projected tokens. Cost: O(V · D²) for what is learned; free of training, O(V · (D + queries)).

The change from each frame to the next is smoothed over time; a small net turns it into the score of beginning a cube,
and the best frames do, so many that a cube has `frames` frames in the mean. Learned queries read all tokens of a cube
by one cross-attention, whose keys have the sines of frame, row and column. Before them stands a thumbnail: the mean of
the frames that begin cubes, `pool` neighbours to a token. In training the scores get their gradient through it alone.
Free of training is `borders=diff-norm,tokens=mean`: borders by the size of the change, and means over parts of the
picture in each cube. A picture is one cube without a thumbnail. Tokens take places of the frame their cube begins with.
Departs from the paper: what is read are tokens behind the projector of a model that stays frozen, not features of its
tower, and their places tell the language model when a cube begins, so that no times are written. Where frames have few
places, a cube has no more tokens than they leave beside the thumbnail.
Departs from the released code: one frame is a picture; the code fails. Its positions are contiguous
(`positions=compact`).
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import winnow.contract as wn
from winnow.parts.cubes import (
    CubeModule,
    cube_of,
    hardened,
    map_of,
    means_in_cubes,
    momentum,
    number_of_cubes,
    starts_of,
    thumbnail_of,
)
from winnow.parts.frame_parts import part_of_place, rows_and_columns
from winnow.parts.frames import frame_slots
from winnow.parts.learned import in_fp32, learned


@wn.register("quicksviewer")
class Quicksviewer(wn.Method):
    """Cut a video into cubes where it changes, and read each by the same few tokens.

    Args:
        frames: of a cube, in the mean.
        queries: tokens of a cube; trained ones are as many as they were trained with.
        pool: neighbours that are one token of the thumbnail.
        borders: where cubes begin: learned, by the size of the change, or `even`, cubes of equal length.
        tokens: of a cube: learned, or means over parts of the picture.
        weights: a file that `winnow train quicksviewer` wrote, or `untrained`; default: those for the video model.
    """

    frames: Annotated[int, wn.Between(1)] = 5
    queries: Annotated[int, wn.Between(1)] = 64
    pool: Annotated[int, wn.Between(1)] = 9
    borders: Literal["learned", "diff-norm", "even"] = "learned"
    tokens: Literal["learned", "mean"] = "learned"
    weights: str | None = None

    across_frames = True
    identity = None
    released = {"positions": "compact"}

    def build(self, info: wn.ModelInfo):
        if "learned" not in (self.borders, self.tokens):
            return None

        def make(queries: int = self.queries) -> CubeModule:
            return CubeModule(info.width, queries)

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), lambda view, state: self.read(view)),)

    def read(self, view: wn.View) -> wn.Emit | wn.Reduction:
        """The tokens of the thumbnail and of the cubes."""
        t, slot = frame_slots(view, self.slug)
        order = slot.argsort(1)
        x = torch.stack([own[at] for own, at in zip(view.tokens, order, strict=True)]).unflatten(1, (t, -1))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        broken = ~x.sum(-1).isfinite()
        wn.count_broken(broken, view)
        x, p = x.masked_fill(broken[..., None], 0), x.shape[2]
        cubes = number_of_cubes(t, self.frames)
        begins = torch.cat([self.begins(own, view.module, cubes) for own in x.split(1)])
        starts = starts_of(begins, cubes)
        pooled = thumbnail_of(p, self.pool, x.device)[: 0 if t == 1 else None]
        if self.tokens == "mean":
            queries = min(self.queries, p - len(pooled))
            part = part_of_place(view.layout, p, queries, x.device)
            weights = means_in_cubes(part, queries, broken, cube_of(begins))
            return map_of(weights, begins, broken, pooled, starts, order)
        place = rows_and_columns(view, order, p)
        lanes = zip(*(own.split(1) for own in (x, broken, place, begins, starts)), strict=True)
        made, weights = map(
            torch.cat, zip(*(in_fp32(view.module.reader, pooled, *lane) for lane in lanes), strict=True)
        )
        found = map_of(weights, begins, broken, pooled, starts, order)
        return wn.Emit(made.to(view.tokens.dtype), provenance=found)

    def begins(self, x: Float[Tensor, "1 t p d"], module: Any, cubes: int) -> Float[Tensor, "1 t"]:
        """1 for each frame that begins a cube."""
        t = x.shape[1]
        if self.borders == "even" or t == 1:
            return x.new_zeros(1, t).index_fill(1, torch.arange(cubes, device=x.device) * t // cubes, 1)
        score = momentum(x).norm(dim=-1).mean(2) if self.borders == "diff-norm" else in_fp32(module.cubing, x.mean(2))
        return hardened(wn.comparable(score), cubes - 1)
