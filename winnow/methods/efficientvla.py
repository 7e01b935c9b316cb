"""EfficientVLA (arXiv 2506.10100): keep a few key tokens of the task, more that it looks at, and some unlike the key.

Looks at: the attention of the text to the image in LM layer K − 1, and the hidden states before layer K. Cost:
O(m · S · D) for m text tokens; O(K_key · N · D) for the similarities.

Relevance is the attention that a token gets, the mean over heads and the sum over the text behind the image. The `key`
most relevant tokens are kept; of the rest of the budget, the share `alpha` goes to the next most relevant, and what is
left to the tokens whose largest cosine similarity to a key token is lowest (those chosen meanwhile do not count).
Only the paper's choice of visual tokens is here; its layer pruning and the cache of its action head are not.
Departs from the paper: it reads the attention of image tokens to the text, which is 0 where text follows the image, as
in all models here; relevance is therefore read in the other direction. K = 2 is our choice: the paper names no layer.
Departs from the released code: it could not be read.
"""

from typing import Annotated

import torch

import winnow.contract as wn
from winnow.parts.cosine import product, unit


@wn.register("efficientvla")
class EfficientVLA(wn.Method):
    """Keep key tokens of the task, others that it looks at, and tokens unlike the key ones.

    Args:
        keep: content tokens that enter layer K.
        key: key tokens; the paper takes 4 to 8.
        alpha: share of the others that is chosen by relevance, rounded down.
        layer: K, the layers that run in full; the step acts before LM layer K.
    """

    keep: wn.Budget = wn.Budget(56)
    key: Annotated[int, wn.Between(1)] = 6
    alpha: wn.Share = 0.5
    layer: Annotated[int, wn.Between(1)] = 2

    def signals(self):
        return (wn.TextAttention(self.layer - 1),)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("layers", info.lm_layer(self.layer)), self._one_step, self.signals()),)

    def reduce(self, view: wn.View) -> wn.Reduction:
        x, broken = unit(view.tokens)
        wn.count_broken(broken, view)
        relevance = wn.comparable(view[self.signals()[0]][..., 0], view).masked_fill(broken, -torch.inf)
        order, k = wn.ranked(relevance), min(self.keep.of(view), view.n)
        keys = order[:, : min(self.key, k)]
        relevant = keys.shape[1] + int(self.alpha * (k - keys.shape[1]) + 1e-9)
        alike = product(x, [own[at] for own, at in zip(x, keys, strict=True)]).amax(2)
        rest = (-alike).masked_fill(relevance == -torch.inf, -torch.inf)
        return wn.top_k(rest.scatter(1, order[:, :relevant], torch.inf), k)
