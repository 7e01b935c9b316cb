"""PromptView: what a step at `prompt` sees. The pictures of one request before any processor or model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from winnow.core.ahead_view import SeveralAhead


@dataclass(frozen=True)
class PromptView(SeveralAhead):
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

    point: ClassVar[str] = "prompt"
    sees: ClassVar[str] = "pixels, sizes, text and features"

    pixels: UInt8[Tensor, "b k h w 3"]
    sizes: Int[Tensor, "b k 2"]
    text: str = ""
    features: Float[Tensor, "b k d"] | None = None
    question_features: Float[Tensor, "b d"] | None = None
    seed: int = 0
    module: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
