"""Selective S4 (arXiv 2303.14526): keep the tokens that a linear scan over all of them finds informative.

Looks at: the projected tokens, and their frames, rows and columns. Cost: O(V · (D · d + d · s) + V log V · d), d = 48
being the width of the scan and s = 8 its states; no token attends to another.

A state-space layer mixes all tokens of the video, from both ends; a small net scores each by what it has become and by
the mean of all. The layer follows, with momentum, the first layer of a classifier of long videos that reads the kept
tokens alone, and the net is trained in that classifier (`winnow.learn.longform`), with Gumbel noise.
Departs from the paper: there the classifier is the whole model, and its blocks go on from the kept tokens; here they
teach the choice, which is made for a language model. The classifier is a toy of two layers without pooling between
them, whose classes are read off single tokens (paper: off their mean); the scan is S4D, and momentum grows to 0.95
only, because the training is short.
Departs from the released code: none is known.
"""

import torch
from jaxtyping import Float

import winnow.contract as wn
from winnow.parts.chunks import place_of
from winnow.parts.learned import in_fp32, learned
from winnow.parts.selective import Chooser


@wn.register("selective-s4")
class SelectiveS4(wn.Method):
    """Keep the tokens that a trained state-space scan scores best.

    Args:
        keep: content tokens of the item.
        weights: a file that `winnow train selective-s4` wrote, or `untrained`; default: those for the video reference
            model.
    """

    keep: wn.Budget = wn.Budget("50%")
    weights: str | None = None

    across_frames = True

    def build(self, info: wn.ModelInfo):
        def make(width: int = 48, states: int = 8) -> Chooser:
            return Chooser(info.width, width, states)

        return learned(self.slug, self.weights, info, make, part="choose")

    def score(self, view: wn.View) -> Float[torch.Tensor, "b n"]:
        place = place_of(view)
        sound = view.tokens.to(torch.promote_types(view.tokens.dtype, torch.float32)).sum(-1).isfinite()
        tokens = view.tokens.masked_fill(~sound[..., None], 0)
        items = zip(tokens.split(1), place.split(1), sound.split(1), strict=True)
        scores = torch.cat([in_fp32(view.module, *item) for item in items])
        return scores.masked_fill(~sound, torch.nan)
