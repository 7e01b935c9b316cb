"""STC (arXiv 2512.00891): keep of each frame what is unlike the frame and unlike all that came before.

Looks at: the projected tokens only, and the mean of earlier frames. Cost: O(V · D).

STC-Pruner. Frames come in chunks, of one frame unless `chunk` says otherwise. Of the channels, the half that varies
least over the chunk counts. A token is like its frame, and like the history, by the sum of five Gaussians (variances
1/8 to 2) of the distance of its direction to the mean direction of the frame, and to that of the mean of all chunks so
far, its own included. Of each frame the tokens stay whose two likenesses sum to the least. No later frame is ever
looked at, and no question. In a stream (`winnow.stream`) the history goes on from frame to frame; in a prompt it begins
anew with each picture or video. It is one vector: a scene that was there is known again, a single still object is not.
STC-Cacher, which reuses what the tower made of still tokens, is `winnow.parts.static_tokens`: tested functions on
plain tensors and blocks, which the engine does not put into towers.
Departs from the paper: the budget is one of the item, in equal parts of its frames; `each` counts it for each frame.
Departs from the released code: a share of the item is the default; there 60 of 196 tokens of each frame stay
(`keep=60`, `each=true`), and their positions are numbered anew (`positions=compact`). The history is kept at its full
width, and the channels of the moment are taken from it; in the code each chunk leaves the channels that it chose, in
the order of their variance, and vectors of different channels are averaged (`compat=true`). A video that is encoded at
once is one chunk there (`chunk=0`).
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

import winnow.contract as wn
from winnow.parts.frames import frame_grid, frame_of
from winnow.parts.gaussians import gaussians
from winnow.parts.per_tile import apportion


@wn.register("stc")
class STC(wn.Method):
    """Keep of each frame what is new in it and in the stream.

    Args:
        keep: content tokens of the item.
        each: whether `keep` counts those of each frame.
        chunk: frames whose channels are chosen together, and which enter the history as one; 0: all of the item.
        compat: whether the history averages the chosen channels of each chunk, whichever they were.
    """

    keep: wn.Budget = wn.Budget(0.3)
    each: bool = False
    chunk: wn.Count = 1
    compat: bool = False

    streaming = True
    across_frames = True
    released = {"keep": 60, "each": True, "chunk": 0, "compat": True, "positions": "compact"}

    def steps(self, info: wn.ModelInfo) -> tuple[wn.Step, ...]:
        return (wn.Step(wn.Point.of(self.at), self.prune),)

    def reduce(self, view: wn.View) -> wn.Reduction:
        """What is left of frames before which there was nothing."""
        return self.prune(view, wn.State())[0].reduction

    def prune(self, view: wn.View, state: wn.State) -> tuple[wn.Reduce, wn.State]:
        """The items of a view do not see one another; later ones see them all."""
        x = view.tokens.to(torch.promote_types(view.tokens.dtype, torch.float32))
        broken = ~x.sum(-1).isfinite()
        wn.count_broken(broken, view)
        frame, grid = frame_of(view), frame_grid(view.layout, view.ids.device)
        zero = (x.new_zeros(()), x.new_zeros(()))
        past = state.request.get("history", zero)
        # Item by item: sums over a batch need not give the bits of its items alone.
        found = [self._likeness(*own, grid.frames, past) for own in zip(x, broken, frame, strict=True)]
        like = torch.stack([own[0] for own in found])
        for _, total, count in found:
            past = (past[0] + total, past[1] + count)
        sizes = torch.zeros(view.b, grid.frames, dtype=torch.int64, device=frame.device)
        sizes.scatter_add_(1, frame, (~broken).long())
        rank = wn.rank_in_tile((-like).masked_fill(broken, -torch.inf), frame)
        if self.each and view.n != grid.frames * grid.places:  # frames may hold unequal numbers
            chosen = wn.Reduction.select(rank < self.keep.of(grid.places))
        elif self.each:
            own = self.keep.of(grid.places)
            chosen = wn.top_k((rank < own).long(), grid.frames * own)
        else:
            quota = apportion(self.keep.of(view), torch.ones_like(sizes), sizes)
            # Broken tokens have no share of the budget; they fill it up where nothing else is left.
            chosen = wn.top_k((rank < quota.gather(1, frame)).long() - broken.long(), self.keep.of(view))
        return wn.Reduce(chosen), replace(state, request={**state.request, "history": past})

    def _likeness(
        self, x: Float[Tensor, "n d"], broken: Bool[Tensor, " n"], frame: Int[Tensor, " n"], frames: int, past: tuple
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "..."], Float[Tensor, "..."]]:
        """How much each token is like its frame and the history; the sum and the number of the chunks' means."""
        length = self.chunk or frames
        chunk, chunks = torch.div(frame, length, rounding_mode="floor"), -(-frames // length)
        x, weight = x.masked_fill(broken[:, None], 0), (~broken).to(x.dtype)[:, None]
        count = weight.new_zeros(chunks, 1).index_add_(0, chunk, weight)
        mean = x.new_zeros(chunks, x.shape[1]).index_add_(0, chunk, x) / count.clamp_min(1)
        spread = x.new_zeros(chunks, x.shape[1]).index_add_(0, chunk, ((x - mean[chunk]) * weight).square())
        steady = wn.ranked(-spread)[:, : max(1, x.shape[1] // 2)]
        there = (count > 0).to(x.dtype)
        left = (mean.gather(1, steady) if self.compat else mean) * there
        memory = (past[0] + left.cumsum(0)) / (past[1] + there.cumsum(0)).clamp_min(1)
        memory = normalize(memory if self.compat else memory.gather(1, steady), dim=-1)
        x = normalize(x.gather(1, steady[chunk]), dim=-1)
        own = x.new_zeros(frames, x.shape[1]).index_add_(0, frame, x)
        held = weight.new_zeros(frames, 1).index_add_(0, frame, weight).clamp_min(1)
        return gaussians(x - (own / held)[frame]) + gaussians(x - memory[chunk]), left.sum(0), there.sum()
