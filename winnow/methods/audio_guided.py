"""Audio-guided budgets (arXiv 2511.14582): keep more of a video where something is heard, as OmniZip does.

Looks at: attention received in the last layer of the encoder of sounds, by the sound beside the video; the projected
tokens. Cost: the attention of one layer over stretches of the sound, streamed; then O(V · D).

The sound is cut into windows of two seconds. What is heard in a window is its share of the quarter of the sound's
tokens that receive most attention. A window of the video keeps the ratio of the whole, times a half and what is heard
beside the mean, within bounds; ratios are then scaled, so that the video keeps exactly its budget. In each window those
tokens stay that differ most from their place in the frame before, as with `evs`. Where there is no sound, all windows
have one ratio.
Departs from the paper: it was not read. The form is that of a short description of it, and windows of 2 s, the quarter
and the bounds were set here. What stays inside a window is chosen by change; the paper merges in time and space,
compresses the sound as well, and ties both by anchors. Frames are taken to be spread evenly over the sound, as where it
is that of the video; what the video's own clock says is not asked.
Departs from the released code: it was not read.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

import winnow.contract as wn
from winnow.parts.audio_guided import guided_quotas, heard_in
from winnow.parts.changed import changed
from winnow.parts.frames import frame_grid, frame_of


@wn.register("audio-guided")
class AudioGuided(wn.Method):
    """Keep of a video what changes, and more of it where something is heard.

    Args:
        keep: content tokens of the video.
        window: tokens of the sound that a window lasts; 50 of 40 ms are two seconds.
        top: share of the sound's tokens that are the most attended ones.
        low, high: bounds of the ratio that a window keeps, before ratios are scaled to the budget.
        heard: what ranks the tokens of the sound.
    """

    keep: wn.Budget = wn.Budget("25%")
    window: Annotated[int, wn.Between(1)] = 50
    top: Annotated[float, wn.Between(1e-6, 1)] = 0.25
    low: wn.Share = 0.05
    high: wn.Share = 1.0
    heard: wn.SoundAttention = wn.SoundAttention()

    modalities = ("video",)
    across_frames = True

    def check(self) -> None:
        if self.low > self.high:
            raise wn.WinnowError(f"audio-guided: low={self.low} is above high={self.high}; allowed: low ≤ high.")

    def reduce(self, view: wn.View) -> wn.Reduction:
        score, kept = changed(view), self.keep.of(view)
        broken = score.isnan()
        heard, window = self._windows(view)
        sizes = torch.zeros(view.b, heard.shape[1], dtype=torch.int64, device=window.device)
        sizes.scatter_add_(1, window, (~broken).long())
        quota = guided_quotas(heard, sizes, kept, self.low, self.high)
        best = wn.rank_in_tile(wn.comparable(score, view), window) < quota.gather(1, window)
        # Broken tokens have no share of the budget; they fill it up where nothing else is left.
        return wn.top_k(best.long() - broken.long(), kept)

    def _windows(self, view: wn.View) -> tuple[Float[Tensor, "b w"], Int[Tensor, "b n"]]:
        """What is heard in each window, and the window of each token of the video: that of the middle of its frame."""
        received, frames = view[self.heard], frame_grid(view.layout, view.ids.device).frames
        tokens = received.shape[1]
        windows = max(1, -(-tokens // self.window))
        middle = (torch.arange(frames, device=view.ids.device) * 2 + 1) * tokens
        window = torch.div(middle, 2 * frames * self.window, rounding_mode="floor")[frame_of(view)]
        if not tokens:
            return received.new_zeros(view.b, 1), window
        wn.count_broken(received.isnan(), view)
        edges = torch.arange(tokens + 1, dtype=torch.float64, device=received.device)
        times = torch.stack([edges[:-1], edges[1:]], 1)  # in tokens, of which all last as long
        return heard_in(received, times, windows, self.window, self.top), window
