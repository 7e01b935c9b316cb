"""PixelPrune (arXiv 2604.00886): drop the cells of a picture whose pixels a neighbour already explains.

Looks at: pixels, as the encoder is given them; neither tower nor question. Cost: O(V · pixels of a cell); above a
threshold of 0 in h + w dependent steps.

A cell is the part of the picture that becomes one token. Each is predicted by its left neighbour A, or by the upper
one, B, where the cell between them is similar to A and not to B; it stays if it is not similar to its prediction. Above
a threshold of 0 the neighbours are those that a decoder would have (`anchored`), so that errors do not add up. The
count depends on the picture. Cells leave before a block of the vision tower: patches have their true positions by then,
and whole cells leave, so that the tower's merger and the places in the LM's sequence hold.
Departs from the paper: a broken cell is kept only where all are.
Departs from the released code: it compares the first of the two equal copies that make a still picture, here both are
compared. Of videos, which it does not take, each frame is scanned by itself, and so are thumbnails and crops. Its scale
of pixel values, 0.5, is the default of `std`. Positions are kept, as in its patch of transformers; in the one for vLLM
text behind a picture starts anew behind the largest kept coordinate.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import winnow.contract as wn
from winnow.parts.prediction import causal, explained


@dataclass(frozen=True)
class CellPixels(wn.Signal):
    """The pixel values behind each token, as the encoder is given them: `[b, N, values]`."""

    def resolve(self, info: wn.ModelInfo):
        if not info.vision_depth:
            raise wn.UnsupportedError(f"winnow does not know the pixels of each token of {info.model}.")
        return self

    def site(self, info: wn.ModelInfo) -> wn.Site:
        return wn.Site("pixels")

    def read(self, seen: wn.Pixels) -> Float[Tensor, "cells v"]:
        return seen.patches

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, 12, generator=generator)


CELLS = CellPixels()


@wn.register("pixelprune")
class PixelPrune(wn.Method):
    """Drop the cells of a picture that their neighbours predict, as a lossless coder would.

    Args:
        threshold: the largest distance of similar cells, of pixel values from 0 to 1.
        metric: distance of two cells: the largest difference (`max`), the mean, or the root of the mean square.
        anchored: whether neighbours are what stands for them once they have left, or themselves.
        std: what the processor has divided pixel values by (CLIP: 0.27 on average); no matter at threshold 0.
        block: the block of the vision tower before which cells leave; −1: they leave before the LM.
    """

    threshold: wn.Share = 0.0
    metric: Literal["max", "mae", "rmse"] = "max"
    anchored: bool = True
    std: Annotated[float, wn.Between(1e-6)] = 0.5
    block: Annotated[int, wn.Between(-1)] = 0

    identity = None
    released = {"positions": "keep"}

    def signals(self):
        return (CELLS,)

    def steps(self, info: wn.ModelInfo):
        at = wn.Point("projected") if self.block < 0 else wn.Point("blocks", self.block)
        return (wn.Step(at, self._one_step, self.signals()),)

    def reduce(self, view: wn.View) -> wn.Reduction:
        pixels, slots = view[CELLS], _slots(view.layout, view.ids.device, self.block >= 0)[view.ids]
        broken = ~pixels.sum(-1).isfinite() & (slots < view.layout.n_content)
        wn.count_broken(broken, view)
        lanes = [self._kept(*item, view.layout) for item in zip(pixels, slots, broken, strict=True)]
        return wn.Reduction.select(torch.stack(lanes))  # the one host read: how many stay depends on the picture

    def _kept(
        self, pixels: Float[Tensor, "n v"], slot: Tensor, broken: Tensor, layout: wn.Layout
    ) -> Bool[Tensor, " n"]:
        """Which tokens of an item stay; [CLS] does."""
        wide, cells = torch.promote_types(pixels.dtype, torch.float32), layout.n_content
        x = pixels.new_full((cells + 1, pixels.shape[1]), torch.nan, dtype=wide)
        x[slot] = (pixels.to(wide) * self.std + 0.5).masked_fill_(broken[:, None], torch.nan)
        x[-1] = torch.nan
        found = explained(x, self._similar, causal(layout, slot.device), self.anchored and self.threshold > 0)
        kept = ~found[slot] & ~broken & (slot < cells)
        return kept | (slot == cells) | ((slot == slot.min()) & ~kept.any())

    def _similar(self, a: Float[Tensor, "c v"], b: Float[Tensor, "c v"]) -> Bool[Tensor, " c"]:
        apart = (a - b).abs_()
        match self.metric:
            case "max":
                distance = apart.amax(-1)
            case "mae":
                distance = apart.mean(-1)
            case _:
                distance = apart.square_().mean(-1).sqrt()
        return distance <= self.threshold


@lru_cache(maxsize=64)
def _slots(layout: wn.Layout, device: torch.device, rows: bool) -> Int[Tensor, " n"]:
    """The content token of each id, which is a row of the layout (at blocks) or counts them; behind all, [CLS]."""
    slots = np.full(layout.n if rows else layout.n_content, layout.n_content)
    slots[layout.content if rows else slice(None)] = np.arange(layout.n_content)
    return torch.from_numpy(slots).to(device)
