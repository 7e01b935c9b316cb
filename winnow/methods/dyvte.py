"""DyVTE (arXiv 2411.19628): drop all visual tokens before the first LM layer whose router says that text has read them.

Looks at: two rows of text in front of each LM layer, the mean of what follows the image and the last token. Cost:
O(D · H) for each layer, H being the width of a router; nothing of it grows with V.

A sample leaves as a whole, all its items at once; in a batch each by itself. Layers that have run keep the keys and
values of the image, and so does decoding there. Positions are kept.
Departs from the paper: there is no router in front of layer 0, where nothing has been read; when routers are trained,
a loss below 0.05 counts as 0.05, because the ratio of two such losses says nothing.
Departs from the released code: any batch size, any place of the image (the code takes tokens 35 … 611), and no
attention maps, which the code asks for and does not use.
"""

from typing import Annotated, Literal

import torch
from torch import nn

import winnow.contract as wn
from winnow.parts.learned import in_fp32, learned


def hidden_for(width: int) -> int:
    """Of a router, for an LM of this width: 2048, as published for 4096 and more, and less for narrow ones."""
    return min(2048, 2 * width // 3)


class Routers(nn.ModuleDict):
    """For each LM layer from the first on, logits of staying and leaving from a summary of the text."""

    def __init__(self, width: int, depth: int, hidden: int) -> None:
        super().__init__()
        for layer in range(1, depth):
            parts = nn.Linear(2 * width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, 2, bias=False)
            self[str(layer)] = nn.Sequential(*parts)


@wn.register("dyvte")
class DyVTE(wn.Method):
    """Drop all visual tokens where a router on the text says that they are no longer needed.

    Args:
        exit: `learned`, `never`, or the layer before which all samples drop them.
        hidden: width of untrained routers; default: what trained ones have, two thirds of the LM's width and at most
            the 2048 of the paper.
        weights: a file that `winnow train dyvte` wrote, or `untrained`; default: those for the reference model.
    """

    exit: wn.Layer | Literal["learned", "never"] = "learned"
    hidden: Annotated[int, wn.Between(1)] | None = None
    weights: str | None = None

    identity = {"exit": "never"}
    released = {"positions": "keep"}

    def build(self, info: wn.ModelInfo):
        if self.exit != "learned":
            return None

        def make(hidden: int = self.hidden or hidden_for(info.width)) -> Routers:
            return Routers(info.width, info.depth, hidden)

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        if self.exit == "learned":
            return tuple(self._step(wn.TextSummary(layer)) for layer in range(1, info.depth))
        layer = min(1, info.depth - 1) if self.exit == "never" else info.lm_layer(self.exit, "exit")
        left = None if self.exit == "never" else 0
        return (wn.Step(wn.Point("layers", layer), lambda view, state: _first(view, left)),)

    def _step(self, text: wn.TextSummary) -> wn.Step:
        return wn.Step(wn.Point("layers", text.layer), lambda view, state: self.leave(view, text), (text,))

    def leave(self, view: wn.View, text: wn.TextSummary) -> wn.Observe | wn.Reduction:
        """Nothing of the samples whose router fires, and everything of the others."""
        router = view.module[str(text.layer)]
        logits = torch.stack([in_fp32(router, summary) for summary in view[text]])  # b 2
        wn.count_broken(logits.isnan().any(-1), view)
        fires = logits[:, 1] > logits[:, 0]
        gone = fires.tolist()  # the one host read: how many tokens are left depends on the data
        if not any(gone):
            return wn.Observe()
        kept = ~fires[:, None].expand(view.b, view.n)
        return wn.Reduction.select(kept, counts=tuple(0 if g else view.n for g in gone))


def _first(view: wn.View, count: int | None) -> wn.Reduction:
    """The first tokens, or all."""
    index = torch.arange(view.n if count is None else count, device=view.tokens.device)
    return wn.Reduction.select(index.expand(view.b, -1), view.n)
