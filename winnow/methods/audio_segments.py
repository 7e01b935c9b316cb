"""Segments by dissimilarity (arXiv 2511.20973): a sound is cut where its tokens change most, and a segment is its mean.

Looks at: the projected tokens only. Cost: O(N · D).

What lies between two neighbours is 1 − cosine. A border is where it is larger than between the neighbours before, and
at least as large as between those behind. How many segments there are follows from the sound; with a budget the
sharpest borders stay, and where there are fewer, the largest of the other changes are borders as well.
Departs from the paper: it trains adapters of the LM for such tokens, and there are none here. `least` and `keep` are
not in it. The rule for a border is that of a review of it.
Departs from the released code: no code has been released.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import winnow.contract as wn
from winnow.parts.adjacent import alike, apart, merged_runs, runs_of


@wn.register("audio-segments")
class AudioSegments(wn.Method):
    """Cut a sound where it changes, and keep the mean of each segment.

    Args:
        keep: content tokens of the item; None: as many as there are segments.
        least: a change of less is no border, unless a budget asks for more.
    """

    keep: wn.Budget | None = None
    least: Annotated[float, wn.Between(0, 2)] = 0.0

    modalities = ("audio",)

    def reduce(self, view: wn.View) -> wn.Reduction:
        x, broken = apart(view.tokens)
        wn.count_broken(broken, view)
        change = 1 - alike(x)
        border = peaks(change) & (change > self.least)
        if self.keep is not None:
            count = min(self.keep.of(view), view.n)
            # No change is larger than 2, so that borders come before all others.
            border = wn.rank_of(change + 4 * border) < count - 1
            return merged_runs(runs_of(~border), ~broken, [count] * view.b)
        run = runs_of(~border)
        return merged_runs(run, ~broken, (run[:, -1] + 1).tolist())  # one host read: the sound decides


def peaks(change: Float[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
    """Where a change is a local maximum; the first of equal ones in a row."""
    edge = change.new_full((change.shape[0], 1), -1)
    return (change > torch.cat([edge, change[:, :-1]], 1)) & (change >= torch.cat([change[:, 1:], edge], 1))
