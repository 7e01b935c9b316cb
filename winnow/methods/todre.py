"""ToDRE: keep mutually dissimilar tokens before the LM, and none at all once the LM's text has stopped looking at them.

Source: arXiv 2505.18757 (v2: max-sum; v1: k-center, `criterion=max`). Looks at: the projected tokens, one [CLS] row of
the last vision block for the first choice, and the attention between text and image in one LM layer.
Cost: O(k · V · D), or O(V² · D) with a table where V ≤ D; one layer of column sums in the LM.

Departs from the paper: kept tokens stay in raster order (it does not say); the LM attention is that of the layer before
7/8 of the depth (28 of 32 layers have run; the paper's "layer 28" can be read so), and the answer covers all of an item
or nothing. Where all text follows the image, attention from image to text is 0 by causality.
Departs from the released code: none was found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.registry import register
from winnow.core.signal import LMAttentionMass, VisionAttention
from winnow.core.step import Action, Keep, Reduce, State, Step
from winnow.core.view import View
from winnow.parts.cosine import cosine_rows, unit
from winnow.parts.greedy import CRITERIA, greedy
from winnow.parts.select import comparable, count_broken
from winnow.parts.settings import one_of, share, switch
from winnow.parts.tiles import in_thumbnail

CLS_ROW = VisionAttention(layer=-1)


@register("todre", family="A", stages=("connector", "decoder"), kind="training-free", arxiv="2505.18757")
@dataclass(frozen=True)
class ToDRE(Method):
    """Keep dissimilar tokens before the LM; drop all in its last layers if text ignores them.

    Args:
        keep: content tokens of the item.
        criterion: similarity to what is kept is a `sum` (v2) or a `max` (v1, k-center).
        pivot: first choice: `cls`, the token that [CLS] attends to most (of the thumbnail, where there are tiles);
            `random`; `auto` is `cls` where the tower has one.
        stage2: whether to drop all tokens at 7/8 of the LM's depth.
        tau: they are dropped where text gives the image, and the image text, less than this share of its attention.
    """

    keep: Budget = Budget("10%")
    criterion: str = "sum"
    pivot: str = "auto"
    stage2: bool = True
    tau: float = 0.10

    identity: ClassVar[dict[str, Any] | None] = {"keep": "100%", "stage2": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "criterion", CRITERIA)
        one_of(self, "pivot", ("auto", "cls", "random"))
        switch(self, "stage2")
        share(self, "tau")

    def signals(self) -> tuple[VisionAttention, ...]:
        return () if self.pivot == "random" else (CLS_ROW,)

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        pivot = self.pivot if self.pivot != "auto" else "cls" if info.has_cls else "random"
        steps = super(ToDRE, replace(self, pivot=pivot)).steps(info)
        layer = max(1, info.at_depth(7 / 8))
        if self.stage2 and layer < info.depth:  # with a single layer there is nothing to look at before it
            masses = (
                LMAttentionMass(layer - 1, rows="question", keys="items"),
                LMAttentionMass(layer - 1, rows="items", keys="question"),
            )
            steps += (Step(Point("layers", layer), partial(self._forget, masses), masses),)
        return steps

    def reduce(self, view: View) -> Reduction:
        x, broken = unit(view.tokens)
        count_broken(broken, view)
        k = min(self.keep.of(view), view.n)
        picks = greedy(cosine_rows(x), self._first(view, broken), k, criterion=self.criterion, broken=broken)
        return Reduction.select(picks.sort(1).values, view.n)

    def _first(self, view: View, broken: Bool[Tensor, "b n"]) -> Int[Tensor, "b 1"]:
        if self.pivot == "random":
            score = view.rand(view.n)
        else:
            score = comparable(view[CLS_ROW], view)
            lowest = torch.finfo(score.dtype).min
            score = score.clamp_min(lowest).masked_fill(~in_thumbnail(view), lowest)
        return score.masked_fill(broken, -torch.inf).argmax(1, keepdim=True)

    def _forget(self, masses: tuple[LMAttentionMass, ...], view: View, state: State) -> tuple[Action, State]:
        ignored = torch.stack([view[mass] < self.tau for mass in masses]).all(0)  # b
        gone = ignored.tolist()  # the one host read: how many tokens are left depends on the data
        if not any(gone):
            return Keep(), state
        kept = ~ignored[:, None].expand(view.b, view.n)
        return Reduce(Reduction.select(kept, counts=tuple(0 if g else view.n for g in gone))), state
