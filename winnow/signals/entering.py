"""Rows of text as they enter an LM layer: what learned methods read beside the visual tokens."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.info import ModelInfo
from winnow.core.signal import Site
from winnow.signals.language import LMEntry, LMSignal


@dataclass(frozen=True)
class TextSummary(LMSignal):
    """Of the text behind the image, as it enters an LM layer: the mean but for the last token, and that: `[b, 2 · D]`.

    Args:
        layer: the LM layer before which the step acts.
        width: D; known once the signal is resolved.
    """

    width: int = 1

    per: ClassVar[Literal["token", "item"]] = "item"

    def resolve(self, info: ModelInfo) -> Self:
        return super().resolve(info)._with(width=info.width)

    def site(self, info: ModelInfo) -> Site:
        return Site("lm", self.layer, "entry")

    def read(self, seen: LMEntry) -> Float[Tensor, "b e"]:
        return torch.cat(seen.behind_items(), -1)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        """A text that says nothing: a router without a bias is undecided about it."""
        return torch.zeros(b, 2 * self.width)


@dataclass(frozen=True)
class QuestionRows(TextSummary):
    """The last rows of the question as they enter an LM layer, zeros before them where it is short: `[b, T, D]`.

    Args:
        count: T.
    """

    count: int = 32

    @property
    def reads_question(self) -> bool:
        return True

    def read(self, seen: LMEntry) -> Float[Tensor, "b t d"]:
        return seen.last_of_question(self.count)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, self.count, self.width, generator=generator)
