"""VidCom² (arXiv 2505.14454): keep what is unlike the video and unlike its frame, more of frames that are unlike it.

Looks at: the projected tokens only. Cost: O(V · D).

Of the channels, the half that varies least over the video counts; over these, tokens have length 1. A token is like the
video, or like its frame, by the sum of five Gaussians (variances 1/8 to 2) of its distance to the mean of all, or of
its frame. A frame keeps R · (1 + p − mean p) of its tokens, where p is the softmax over frames, at a temperature, of
how little its tokens are like the video; in it, those stay whose two likenesses sum to the least.
Departs from the paper: this is what the code computes, which gave its figures. By default the item keeps exactly its
budget, for which the ratios are weights of frames. A picture is one frame, whatever its tiles.
Departs from the released code: budgets are exact by default; in the code each frame keeps its ratio, rounded half to
even, and one token at least (`exact=false`). Means leave out broken tokens. Positions are kept by default, as for all
methods of winnow; the code numbers them anew.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

import winnow.contract as wn
from winnow.parts.frames import frame_grid, frame_of
from winnow.parts.gaussians import gaussians
from winnow.parts.per_tile import apportion


@wn.register("vidcom2")
class VidCom2(wn.Method):
    """Keep what is unlike the video and unlike its frame.

    Args:
        keep: content tokens of the item; as a share, the ratio R.
        temperature: of the softmax over frames.
        channels: share of the channels that count, those of the least variance.
        exact: whether the item keeps exactly its budget, or each frame its own ratio, rounded.
    """

    keep: wn.Budget = wn.Budget(0.25)
    temperature: Annotated[float, wn.Between(1e-6)] = 0.01
    channels: Annotated[float, wn.Between(0.01, 1)] = 0.5
    exact: bool = True

    released = {"exact": False, "positions": "compact"}
    across_frames = True

    def reduce(self, view: wn.View) -> wn.Reduction:
        x = view.tokens.to(torch.promote_types(view.tokens.dtype, torch.float32))
        broken = ~x.sum(-1).isfinite()
        wn.count_broken(broken, view)
        frame, frames = frame_of(view), frame_grid(view.layout, view.ids.device).frames
        # Item by item: sums over a batch need not give the bits of its items alone.
        found = [self._likeness(*own, frames) for own in zip(x, broken, frame, strict=True)]
        video, both = (torch.stack(parts) for parts in zip(*found, strict=True))
        sizes = torch.zeros(view.b, frames, dtype=torch.int64, device=frame.device)
        sizes.scatter_add_(1, frame, (~broken).long())
        ratios = self._ratios(_mean_of(video, ~broken, frame, frames), view)
        kept = self.keep.of(view)
        quota = apportion(kept, ratios * sizes, sizes) if self.exact else (ratios * sizes).round().long().clamp_min(1)
        best = wn.rank_in_tile((-both).masked_fill(broken, -torch.inf), frame) < quota.gather(1, frame)
        # Broken tokens have no share of the budget; they fill it up where nothing else is left.
        return wn.top_k(best.long() - broken.long(), kept) if self.exact else wn.Reduction.select(best)

    def _likeness(
        self, x: Float[Tensor, "n d"], broken: Tensor, frame: Int[Tensor, " n"], frames: int
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """How much each token is like the video, and that and how much it is like its frame."""
        x, weight = x.masked_fill(broken[:, None], 0), (~broken).to(x.dtype)[:, None]
        count = weight.sum().clamp_min(1)
        variance = ((x - x.sum(0) / count) * weight).square().sum(0) / count
        steady = wn.ranked(-variance[None])[0, : max(1, int(x.shape[1] * self.channels))].sort().values
        x = normalize(x[:, steady], dim=-1)
        own = x.new_zeros(frames, x.shape[1]).index_add_(0, frame, x)
        held = weight.new_zeros(frames, 1).index_add_(0, frame, weight).clamp_min(1)
        video = gaussians(x - x.sum(0) / count)
        return video, video + gaussians(x - (own / held)[frame])

    def _ratios(self, like: Float[Tensor, "b t"], view: wn.View) -> Float[Tensor, "b t"]:
        """The share that each frame keeps."""
        p = (-like / self.temperature).softmax(1)
        return (float(self.keep.share(view.n_visual)) * (1 + p - p.mean(1, keepdim=True))).clamp_max(1)


def _mean_of(values: Float[Tensor, "b n"], whole: Tensor, frame: Int[Tensor, "b n"], frames: int) -> Tensor:
    """`[b, t]` the mean over the tokens of each frame that are not broken."""
    sums, counts = (
        values.new_zeros(values.shape[0], frames).scatter_add_(1, frame, part)
        for part in (values.masked_fill(~whole, 0), whole.to(values.dtype))
    )
    return sums / counts.clamp_min(1)
