"""SpeechPrune (arXiv 2412.12009): keep what sounds like the question, and of it what the LM's first layer looks at.

Looks at: the cosine of the projected tokens with those of the question; one row of attention in LM layer 0, from the
last token of the prompt. Cost: O(N · m · D) for m words, and O(H · N · D_head).

A token is as similar to the question as to the word that it is most similar to, and this is smoothed in time. Half of
what is to go leaves before the LM by that; of the rest, what the last token attends to least leaves before layer 0. Of
that layer only queries and keys are computed for it, and all that is left is then read by all layers. What stays keeps
its order.
Departs from the paper: nothing that is known; its card was written from the abstract, and the halves, the window and
the last token are read from it.
Departs from the released code: no code has been released.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from torch.nn.functional import avg_pool1d

import winnow.contract as wn

ALIKE = wn.QuestionCosine()
SEEN = wn.LMAttention(0)


@wn.register("speechprune")
class SpeechPrune(wn.Method):
    """Keep what sounds like the question, then what the last token attends to in layer 0.

    Args:
        left: content tokens that are left behind both phases; at a pruning rate p, 1 − p of them.
        window: tokens over which similarity is smoothed, an odd number; 1 smooths nothing.
    """

    left: wn.Budget = wn.Budget("80%")
    window: Annotated[int, wn.Between(1)] = 5

    identity = {"left": "100%"}
    modalities = ("audio",)

    def check(self) -> None:
        if self.window % 2 == 0:
            raise wn.WinnowError(f"speechprune: window={self.window} has no middle; allowed: odd numbers from 1.")

    def at_budget(self, budget, content: int):
        """What is left behind the second phase."""
        return self.replace(left=wn.Budget.parse(budget))

    def steps(self, info: wn.ModelInfo):
        first = wn.Step(wn.Point("projected"), lambda view, state: self.similar(view), (ALIKE,))
        return first, wn.Step(wn.Point("layers", 0), lambda view, state: self.attended(view), (SEEN,))

    def similar(self, view: wn.View) -> wn.Reduction:
        """Phase 1: half of what is to go leaves."""
        left = self.left.of(view)
        return wn.top_k(self.likeness(view), left + (view.n_visual - left) // 2, view)

    def likeness(self, view: wn.View) -> Float[torch.Tensor, "b n"]:
        """How similar each token and its neighbours in time are to some word of the question."""
        best = view[ALIKE].to(torch.promote_types(view[ALIKE].dtype, torch.float32)).amax(-1)
        broken = best.isnan()
        count = avg_pool1d((~broken).to(best.dtype), self.window, 1, self.window // 2)
        total = avg_pool1d(best.masked_fill(broken, 0), self.window, 1, self.window // 2)
        return (total / count.clamp_min(torch.finfo(best.dtype).tiny)).masked_fill(broken, torch.nan)

    def attended(self, view: wn.View) -> wn.Reduction:
        """Phase 2: of the rest, what the last token of the prompt looks at stays."""
        return wn.top_k(view[SEEN], self.left.of(view), view)
