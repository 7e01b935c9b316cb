"""ToMe (arXiv 2210.09461): merge the most similar tokens in every block of the vision tower, by a cheap matching.

Looks at: the keys of every vision block, mean over heads. Cost: O(N² / 4 · D_head) and a sort in each block.

In each block, between attention and MLP, the even tokens look for the most similar odd one; the r best pairs become
one, as a mean by the patches that each stands for. In later blocks a token weighs as many times in attention
(`proportional`; the authors do without it on MAE).
Departs from the paper: nothing. The default r is the authors' for 577 tokens. The blocks are those up to the one that
feeds the projector; each tile is merged by itself.
Departs from the released code: without [CLS] the code leaves the even tokens that stay in the order of falling likeness
(`order=likeness`), so that the next block pairs others; here they keep their own. It has no language model behind it.
"""

from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Int

import winnow.contract as wn
from winnow.parts.pair_merge import merge_pairs, most_pairs, pairs_to
from winnow.parts.tower import prefix


@wn.register("tome")
class ToMe(wn.Method):
    """Merge the r most similar pairs of tokens in every block of the vision tower.

    Args:
        r: pairs that merge in each block.
        each: instead of r, pairs of each block in turn; blocks behind the list merge none.
        proportional: whether tokens weigh by their size as keys of later blocks.
        inflect: how r changes over the blocks: linearly from r · (1 − inflect) to r · (1 + inflect).
        left: instead of both, patches of each tile that are left behind the last block.
        order: of the even tokens that stay, where there is no [CLS]: their own `place`, or falling `likeness`.
        split: who looks for a partner: `even` tokens, or half of them at `random`.
    """

    r: wn.Count = 23
    proportional: bool = True
    each: tuple[wn.Count, ...] | None = None
    inflect: Annotated[float, wn.Between(-1, 1)] = 0
    left: wn.Budget | None = None
    order: Literal["place", "likeness"] = "place"
    split: Literal["even", "random"] = "even"

    identity = {"r": 0}
    released = {"order": "likeness", "positions": "keep"}

    def at_budget(self, budget, content: int):
        """As many pairs in every block as leave the budget; as a share, because tiles do not know of each other."""
        return self.replace(left=f"{float(100 * wn.Budget.parse(budget).share(content)):.8f}%")

    def steps(self, info: wn.ModelInfo):
        keys = [wn.VisionKeys(block) for block in range(wn.VisionKeys().block(info) + 1)]
        at = [wn.Point("blocks", block, "mlp") for block in range(len(keys))]
        return tuple(wn.Step(at[i], partial(self._step, k, i, len(keys)), (k,)) for i, k in enumerate(keys))

    def schedule(self, blocks: int) -> list[int]:
        """Pairs of each block, where that many are there."""
        if self.each is not None:
            return [*self.each, *[0] * blocks][:blocks]
        least = int(self.r * (1.0 - self.inflect))
        slope = 2 * (self.r - least) / max(1, blocks - 1)
        return [int(least + slope * block) for block in range(blocks)]

    def pairs(self, view: wn.View, block: int, blocks: int) -> int:
        """Pairs that merge in a block, of those that are there."""
        if self.left is not None:
            return pairs_to(view, self.left.of(view), block, blocks, "tome")
        return min(most_pairs(view), self.schedule(blocks)[block])

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The merge of a first block, whose keys are the only signal."""
        return self.merge(view, wn.State(), wn.VisionKeys(), self.pairs(view, 0, 1))[0].reduction

    def _step(self, keys: wn.VisionKeys, block: int, blocks: int, view: wn.View, state: wn.State):
        return self.merge(view, state, keys, self.pairs(view, block, blocks))

    def merge(self, view: wn.View, state: wn.State, keys: wn.VisionKeys, r: int) -> tuple[wn.Reduce, wn.State]:
        """Merge r pairs; `state.summed` holds how many patches each token stands for."""
        likeness, turn = self.order == "likeness", self._turn(view)
        return merge_pairs(view, state, view[keys], r, turn=turn, proportional=self.proportional, by_likeness=likeness)

    def _turn(self, view: wn.View) -> Int[torch.Tensor, " n"] | None:
        """The tokens in the order in which they are even and odd, where it is not their own; [CLS] stays the first."""
        if self.split == "even":
            return None
        places = torch.arange(view.n, device=view.tokens.device)
        return torch.where(places < prefix(view), -1.0, view.rand(view.n)[0]).argsort()
