"""MMTok (arXiv 2508.18264): keep the tokens that together cover the question's tokens and the whole picture.

Looks at: the projected tokens, the LM input embeddings of the question's words, and the output of the feature block.
Cost: O(V² · C) for the picture's similarities; O(k · V²) for the choice at worst, and little of it in practice, because
what a token once gained bounds what it gains later.

A token covers a question's token, or a patch, by the share that a softmax over all tokens gives it; a set covers by its
best token. Gains add up over the question (mean) and over the picture (mean, times `alpha`).
Departs from the paper: no second model drafts an answer whose words would be covered as well; the code has none either.
The paper names words to cover and the code a list of words to leave out, which is used here; telling words apart needs
the tokenizer (`processor=`), and without it all tokens of the question count.
Departs from the released code: tokens of the question are those of the prompt, where the code splits the question into
words and reads each anew. With tiles the budget is that of the item (29 for each of 5 crops is 145). A token that is
broken is covered by others and kept last. Positions are kept by default, as for all methods of winnow; the code numbers
them anew. For Qwen2.5-VL the code has `tau_text=0.01`, no list of words, and floors shares of tokens.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Int
from torch import Tensor

import winnow.contract as wn
from winnow.parts.apart import select_per_tile
from winnow.parts.cosine import unit
from winnow.parts.coverage import coverage

Heat = Annotated[float, wn.Between(1e-3)]


@wn.register("mmtok")
class MMTok(wn.Method):
    """Keep the tokens that cover the words of the question and the picture best (greedy maximum coverage).

    Args:
        keep: content tokens of the item, split equally over its tiles.
        alpha: how much covering the picture counts beside the question.
        tau_text, tau_vision: of the softmaxes; the smaller, the fewer tokens can cover the same.
        question: what is to be covered of the question, as cosines with the tokens.
        features: what is to be covered of the picture, and by what its tokens are compared.
    """

    keep: wn.Budget = wn.Budget(64)
    alpha: Annotated[float, wn.Between(0)] = 0.5
    tau_text: Heat = 0.02
    tau_vision: Heat = 0.2
    question: wn.QuestionCosine = wn.QuestionCosine(words="content")
    features: wn.VisionFeatures = wn.VisionFeatures()

    pairwise = True
    released = {"positions": "compact"}

    def signals(self):
        return (self.question, self.features) if self.alpha else (self.question,)

    def reduce(self, view: wn.View) -> wn.Reduction:
        cosines = view[self.question]
        cosines = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
        features = view[self.features] if self.alpha else view.tokens
        broken = ~(cosines.sum(-1) + view.tokens.sum(-1) + features.sum(-1)).isfinite()
        wn.count_broken(broken, view)
        return select_per_tile(view, self.keep.of(view), self._choose, cosines, features, broken)

    def _choose(self, k: int, cosines: Tensor, features: Tensor, broken: Bool[Tensor, "b n"]) -> Int[Tensor, "b k"]:
        """Each item by itself; a row of its table is what one token covers."""
        tables = []
        for item, rows, lost in zip(cosines, features, broken, strict=True):
            text = item.masked_fill(lost[:, None], -1).div(self.tau_text).softmax(0) / item.shape[1]
            table = text
            if self.alpha:
                ((x,), _) = unit(rows[None])
                seen = torch.mm(x, x.T).div_(self.tau_vision).softmax(0).mul_(self.alpha / len(x))
                table = torch.cat([text, seen.to(text.dtype)], 1)
            tables.append(table)
        return coverage(tables, k, broken=broken)
