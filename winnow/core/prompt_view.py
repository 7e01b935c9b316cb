"""PromptView: what a step at `prompt` sees. The pictures of one request before any processor or model."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.signal import Signal


@dataclass(frozen=True)
class PromptView:
    """The pictures of one request, of which a step says which enter.

    A budget of this view is a number of pictures, or a share of them: `keep.of(view)`.

    Attributes:
        pixels: `[1, K, h, w, 3]` small copies of the pictures, each in the upper left corner; zeros fill the rest where
            pictures have other shapes.
        sizes: `[1, K, 2]` height and width of the pictures themselves.
        text: of the last message of the user: the question.
        features: `[1, K, D]` what the caller knows of each picture, or None.
        question_features: `[1, D]` what the caller knows of the question, in the same space, or None.
        seed: of this view's own random numbers; the global generator is never used.
        module: what the method's `build` made; None if it made nothing.
        notes: what the step records.
    """

    pixels: UInt8[Tensor, "b k h w 3"]
    sizes: Int[Tensor, "b k 2"]
    text: str = ""
    features: Float[Tensor, "b k d"] | None = None
    question_features: Float[Tensor, "b d"] | None = None
    seed: int = 0
    module: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, signal: Signal) -> Tensor:
        raise WinnowError(
            f"A step at prompt cannot see {signal}: no model has run. It sees pixels, sizes, text and features."
        )

    @property
    def b(self) -> int:
        return self.pixels.shape[0]

    @property
    def n(self) -> int:
        """Pictures."""
        return self.pixels.shape[1]

    @property
    def n_visual(self) -> int:
        """Pictures: what a share of a budget is a share of."""
        return self.n

    def rand(self, *shape: int) -> Float[Tensor, "..."]:
        """Uniform numbers in [0, 1), `[b, *shape]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(*shape, generator=generator).to(self.pixels.device).expand(self.b, *shape)
