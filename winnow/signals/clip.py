"""Signals of the space that CLIP's pictures and texts share, of which a model has but a part."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.signal import Site
from winnow.signals.question import Question, QuestionSignal, Words
from winnow.signals.vision import HiddenStates, VisionSignal

NEEDED = (
    "needs CLIP's text tower, which is not part of the model, and the processor, which says what the question is: "
    "winnow.compress(model, plan, processor=processor, text_encoder='openai/clip-vit-large-patch14-336'); or choose "
    "text=lm where the method offers it"
)


@dataclass(frozen=True)
class ClipPatches(VisionSignal):
    """Patches in the space that CLIP's pictures and texts share: `[b, N, C]`.

    Args:
        layer: the block whose output is projected.
        norm: whether CLIP's last normalisation comes before the projection.
    """

    norm: bool = True

    needs_text_encoder: ClassVar[bool] = True

    def site(self, info: ModelInfo) -> Site:
        return Site("vision", self.block(info), shows="hidden")

    def read(self, seen: HiddenStates) -> Float[Tensor, "t n c"]:
        if seen.text_encoder is None:
            raise UnsupportedError(f"{self} {NEEDED}.")
        return seen.text_encoder.patches(seen.after[:, seen.prefix :], self.norm)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, n, 16, generator=generator)


@dataclass(frozen=True)
class ClipText(QuestionSignal):
    """The question in the space that CLIP's pictures and texts share: `[b, M, C]`.

    Args:
        words: see `QuestionSignal`.
        pool: `"pieces"` cuts a question of more than 77 ids into M pieces, as CDPruner's code does; `"end"` reads the
            last of 77 ids, padding or not, as Recoverable Compression's code does, and `"eot"` the end of the text.
    """

    words: Words = "question"
    pool: Literal["eot", "pieces", "end"] = "eot"

    needs_text_encoder: ClassVar[bool] = True
    per: ClassVar[Literal["token", "item"]] = "item"

    def read(self, seen: Question) -> Float[Tensor, "m c"]:
        if seen.text_encoder is None:
            raise UnsupportedError(f"{self} {NEEDED}.")
        return seen.text_encoder.text(seen.text(), self.pool)

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, 1, 16, generator=generator)
