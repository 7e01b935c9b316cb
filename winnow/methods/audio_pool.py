"""Qwen2-Audio's pooling (arXiv 2407.10759): the mean of every k tokens that follow one another.

Looks at: nothing. Cost: O(N · D).

Qwen2-Audio and Qwen2.5-Omni pool by 2 behind their encoder, from 50 to 25 tokens for a second; this pools what they
give once more. The last window may be shorter, and is the mean of what it has. A token stands at the middle of its
window.
Departs from the paper: its pooling is part of the encoder, and the model was trained with it; at another k this is the
same operator, without training.
Departs from the released code: its operator is a layer of the model and no method of its own, so there are no released
settings; it leaves out a last token that fills no window.
"""

from typing import Annotated

import torch

import winnow.contract as wn
from winnow.parts.adjacent import apart, merged_runs


@wn.register("audio-pool")
class AudioPool(wn.Method):
    """Mean of every k tokens in a row.

    Args:
        k: tokens of a window.
    """

    k: Annotated[int, wn.Between(1)] = 2

    identity = {"k": 1}
    modalities = ("audio",)

    def reduce(self, view: wn.View) -> wn.Reduction:
        _, broken = apart(view.tokens)
        wn.count_broken(broken, view)
        run = (torch.arange(view.n, device=view.ids.device) // self.k).expand(view.b, -1)
        return merged_runs(run, ~broken, [-(-view.n // self.k)] * view.b)
