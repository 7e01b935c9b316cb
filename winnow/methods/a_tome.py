"""A-ToMe (arXiv 2306.16009): merge neighbours in time that are alike; their order stays.

Looks at: the projected tokens only. Cost: O(N · D) in each round, and a pass over N numbers for each merge.

In a round, neighbours become pairs from the most alike on, no token twice. A pair becomes the mean of its two, weighted
by how many frames each stands for, at the mean of their times. Rounds go on until the budget is met, as the layers of
the paper's encoder do; a round merges at most a third of the neighbours, which can always be done. With a threshold
only pairs that are more alike than it merge, in so many rounds, and what is left follows from the sound.
An item is one utterance: nothing merges across two. A picture is read as one row, in raster order.
Departs from the paper: it merges inside the encoder, by its keys, with a model that was trained so; here the encoder
has run and its tokens are compared. There is no bias for the size of a token: attention in the LM takes none.
Departs from the released code: no code has been released.
"""

from typing import Annotated

import torch

import winnow.contract as wn
from winnow.parts.adjacent import alike, apart, disjoint_pairs, means_of, merged_runs, runs_of


@wn.register("a-tome")
class AToMe(wn.Method):
    """Merge neighbours in time that are alike, in order.

    Args:
        keep: content tokens of the item.
        threshold: instead of a budget, the cosine above which a pair merges.
        rounds: with a threshold; each can double the length of what is merged.
    """

    keep: wn.Budget = wn.Budget("50%")
    threshold: Annotated[float, wn.Between(-1, 1)] | None = None
    rounds: wn.Count = 1

    modalities = ("audio",)

    def reduce(self, view: wn.View) -> wn.Reduction:
        x, broken = apart(view.tokens)
        wn.count_broken(broken, view)
        run = torch.arange(view.n, device=x.device).repeat(view.b, 1)
        if self.threshold is None:
            counts = [min(self.keep.of(view), view.n)] * view.b
            for pairs in rounds_to(view.n, counts[0]):
                run = self._round(x, broken, run, pairs)
        else:
            for _ in range(self.rounds):
                run = self._round(x, broken, run, view.n // 2)
            counts = (run[:, -1] + 1).tolist()  # the one host read: how many are left depends on the sound
        return merged_runs(run, ~broken, counts)

    def _round(self, x: torch.Tensor, broken: torch.Tensor, run: torch.Tensor, pairs: int) -> torch.Tensor:
        """The runs after a round of merging."""
        likeness = alike(means_of(x, run, ~broken))
        behind = torch.arange(likeness.shape[1], device=x.device) >= run[:, -1:]
        likeness = likeness.masked_fill(behind, -torch.inf)
        if self.threshold is not None:
            likeness = likeness.masked_fill(likeness <= self.threshold, -torch.inf)
        return runs_of(disjoint_pairs(likeness, pairs)).gather(1, run)


def rounds_to(n: int, keep: int) -> list[int]:
    """Pairs that merge in each round, from n tokens down to a budget."""
    found = []
    while n > keep:
        found.append(min(n - keep, -(-(n - 1) // 3)))
        n -= found[-1]
    return found
