"""CDPruner (arXiv 2506.10967): keep tokens that are diverse and relevant, by a determinantal point process.

Looks at: the projected tokens, and the question. Cost: O(k · V · D) for similarities, or O(V² · D) with a table where
V ≤ D; O(k² · V) for the choice, in k steps.

The kernel is `r_i · cos(x_i, x_j) · r_j`, r the relevance of a token to the question, scaled to 0 … 1 over the item.
By default relevance is the cosine of projected tokens with the mean of the LM input embeddings of the question's tokens
(`text=lm`). This is a variant: the paper has CLIP's own space (`text=clip`), whose text tower no checkpoint of a model
holds and which must be handed over.
Departs from the paper: see above; a constant relevance is 1 for all.
Departs from the released code: `text=lm` for `text=clip`, see above. The code turns the sign of CLIP's cosines, because
its authors saw that this is better in that space, and so does `sign=auto`. Past the rank of the kernel the code gives
NaN and takes tokens twice; here the most relevant of what is left are kept. Its budget is for each crop (29 for each of
5 crops is 145), newlines go there, and relevance has one scale over all pictures of a call. Positions are kept by
default, as for all methods of winnow; the code numbers them anew.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import winnow.contract as wn
from winnow.parts.apart import select_per_tile
from winnow.parts.cosine import cosine_rows, product, unit
from winnow.parts.dpp import greedy_map

EPSILON = 1e-6  # of the code: above 0, so that the least relevant token can still be told from none


@wn.register("cdpruner")
class CDPruner(wn.Method):
    """Keep mutually different tokens, the relevant ones first (greedy determinantal point process).

    Args:
        keep: content tokens of the item, split equally over its tiles.
        text: what relevance is measured by: LM embeddings (`lm`), or the space of a CLIP that was handed over (`clip`).
        sign: whether similar tokens are relevant (`plus`) or the others (`minus`); `auto` is `minus` for `clip` alone.
        theta: trades diversity (0) for relevance (towards 1), as exp(θ / (2 − 2θ) · r); without it, r itself.
        question: what tokens are compared with, for `lm`.
        patches, words: what is compared, for `clip`.
    """

    keep: wn.Budget = wn.Budget(64)
    text: Literal["lm", "clip"] = "lm"
    sign: Literal["auto", "plus", "minus"] = "auto"
    theta: Annotated[float, wn.Between(0, 0.99)] | None = None
    question: wn.QuestionCosine = wn.QuestionCosine(words="question", pool="mean")
    patches: wn.ClipPatches = wn.ClipPatches()
    words: wn.ClipText = wn.ClipText(pool="pieces")

    released = {"text": "clip", "positions": "compact"}

    def signals(self):
        return (self.question,) if self.text == "lm" else (self.patches, self.words)

    def reduce(self, view: wn.View) -> wn.Reduction:
        score = self._similarity(view)
        broken = ~(score.isfinite() & view.tokens.sum(-1).isfinite())
        wn.count_broken(broken, view)
        weight = self._relevance(score, broken)
        return select_per_tile(view, self.keep.of(view), self._choose, view.tokens, weight, broken)

    def _similarity(self, view: wn.View) -> Float[Tensor, "b n"]:
        """To the question, mean over its tokens or pieces."""
        if self.text == "lm":
            cosines = view[self.question]
        else:
            patches, broken = unit(view[self.patches])
            cosines = product(patches, unit(view[self.words])[0]).masked_fill(broken[..., None], torch.nan)
        return cosines.to(torch.promote_types(cosines.dtype, torch.float32)).mean(-1)

    def _relevance(self, score: Float[Tensor, "b n"], broken: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        turned = self.sign == "minus" or (self.sign == "auto" and self.text == "clip")
        score = -score if turned else score
        low = score.masked_fill(broken, torch.inf).amin(1, keepdim=True)
        high = score.masked_fill(broken, -torch.inf).amax(1, keepdim=True)
        r = torch.where(high > low, (score - low + EPSILON) / (high - low), 1).masked_fill(broken, 0)
        return r if self.theta is None else (r * (self.theta / (2 * (1 - self.theta)))).exp()

    def _choose(self, k: int, tokens: Tensor, weight: Tensor, broken: Tensor) -> Int[Tensor, "r k"]:
        x, _ = unit(tokens)
        length = torch.stack([item.any(-1).to(item.dtype) for item in x])  # of a unit vector, without its rounding
        return greedy_map(cosine_rows(x), length, k, weight=weight, broken=broken)
