"""VTW, Visual Tokens Withdrawal (arXiv 2405.05803): no image token goes beyond a layer in the middle of the LM.

Looks at: nothing. Cost: none.

The layers behind keep only the text, which is taken to have read the image by then; layers that have run keep its keys
and values, also when decoding. The layer is searched on a few samples: it is the first at which the next token's
distribution, without the image from there on, differs from the whole model's by no more than η (KL divergence, mean
over samples). `calibrate(run)` is this search. Published for LLaVA-1.5-7B: layer 15 or 16 of 32, half of the depth.
Departs from the paper: nothing.
Departs from the released code: any number, size and place of pictures (there, 576 tokens behind 35 tokens of text),
with the newlines between their rows. Its search starts at layer 5 (`first=5`) and takes η from the model's name: 0.003,
for LLaVA-1.5-13B 0.0005, for LLaVA-1.6-7B 0.0001.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

import winnow.contract as wn


@wn.register("vtw")
class VTW(wn.Method):
    """Withdraw all image tokens before a layer in the middle of the LM.

    Args:
        layer: the LM layer before which they leave, or its share of the depth.
    """

    layer: wn.Layer | wn.Share = 0.5

    identity = None
    released = {"positions": "keep"}

    def resolve(self, info: wn.ModelInfo):
        return self.replace(layer=info.at_depth(self.layer)) if isinstance(self.layer, float) else self

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("layers", info.lm_layer(self.layer)), self._one_step),)  # type: ignore[arg-type]

    def reduce(self, view: wn.View) -> wn.Reduction:
        return wn.Reduction.select(view.ids[:, :0], view.n)

    def calibrate(self, run: Callable[..., Any], *, eta: float = 0.003, first: int = 1) -> "VTW":
        """The method at the first layer that changes the next token's distribution by no more than `eta`.

        Args:
            run: gives the logits `[samples, vocabulary]` behind each prompt under a method, and for None without one.
            eta: what is allowed of the KL divergence from the whole model, mean over samples.
            first: the layer at which the search starts.

        Raises:
            WinnowError: the model has no such layer.
        """
        whole = _log_probabilities(run(None))
        for layer in count(first):
            method = self.replace(layer=layer)
            try:
                found = _log_probabilities(run(method))
            except wn.WinnowError as error:
                raise wn.WinnowError(
                    f"vtw: eta={eta}; allowed: what a layer from {first} on comes within. It ended there: {error}"
                ) from error
            if (found.exp() * (found - whole)).sum(-1).mean() <= eta:
                return method
        raise AssertionError


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
