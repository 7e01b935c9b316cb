"""FasterVLM: keep the patches that the vision encoder's [CLS] token attends to, before the language model reads any.

Source: arXiv 2412.01818. Looks at: one attention row of one vision block. Cost: O(V · D) for the row, then
O(V log V).

Departs from the paper: on towers without [CLS] (`query="auto"`) a token's score is the attention that it receives from
all queries, in the mean; the query that was used is recorded in the view's notes.
Departs from the released code: the row alone is computed, not the maps of every block; with tiles, newlines stay and
the budget is that of the whole item, split equally (the code's 29 for each of 5 crops is `keep=145` here).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.reduction import Reduction
from winnow.core.registry import register
from winnow.core.signal import VisionAttention
from winnow.core.step import Step
from winnow.core.view import View
from winnow.parts.settings import block, one_of
from winnow.parts.tiles import top_k_per_tile


@register("fastervlm", family="A", stages=("connector",), kind="training-free", arxiv="2412.01818")
@dataclass(frozen=True)
class FasterVLM(Method):
    """Keep the patches that the vision encoder's [CLS] attends to.

    Args:
        keep: content tokens of the item, split equally over its tiles.
        query: `cls` reads the row of [CLS], `all` the mean over all queries; `auto` is `cls` where the tower has one.
        layer: the vision block; `feature` is the one whose output feeds the projector.
    """

    keep: Budget = Budget(64)
    query: str = "auto"
    layer: int | str = "feature"

    identity: ClassVar[dict[str, Any] | None] = {"keep": "100%"}

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "query", ("auto", "cls", "all"))
        block(self, "layer")

    @property
    def attention(self) -> VisionAttention:
        return VisionAttention(self.layer, query="all" if self.query == "all" else "cls")

    def signals(self) -> tuple[VisionAttention, ...]:
        return (self.attention,)

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        query = self.query if self.query != "auto" else "cls" if info.has_cls else "all"
        return super(FasterVLM, replace(self, query=query)).steps(info)

    def reduce(self, view: View) -> Reduction:
        view.notes["fastervlm.query"] = self.attention.query
        return top_k_per_tile(view[self.attention], self.keep.of(view), view)
