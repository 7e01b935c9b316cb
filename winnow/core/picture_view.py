"""PictureView: what a step at `pixels` sees. One picture before any processor or model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import UInt8
from torch import Tensor

from winnow.core.ahead_view import AheadView
from winnow.core.errors import WinnowError


@dataclass(frozen=True)
class PictureView(AheadView):
    """One picture, of which a step says which part enters and at what size.

    A budget of this view is a number of tokens, or a share of those that the model would make of the picture as it is:
    `keep.of(view)`. Both are known only where `side` and `tokens` are.

    Attributes:
        pixels: `[1, h, w, 3]` a small copy of the picture.
        size: height and width of the picture itself.
        side: pixels of one side of a token, in a model that takes pictures at their own resolution and whose processor
            is known; else None.
        tokens: that the model would make of the picture as it is; None where `side` is.
        least: tokens that it makes of the smallest picture, to which its processor scales smaller ones up.
        seed: of this view's own random numbers; the global generator is never used.
        module: what the method's `build` made; None if it made nothing.
        notes: what the step records.
    """

    point: ClassVar[str] = "pixels"
    sees: ClassVar[str] = "pixels, the size, and how many tokens the picture would become"

    pixels: UInt8[Tensor, "b h w 3"]
    size: tuple[int, int]
    side: int | None = None
    tokens: int | None = None
    least: int = 1
    seed: int = 0
    module: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def n_visual(self) -> int:
        """Tokens of the picture as it is: what a share of a budget is a share of."""
        if self.tokens is None:
            raise WinnowError(
                "how many tokens the picture would become is not known: this needs a model that takes pictures at "
                "their own resolution, and its processor: winnow.compress(model, plan, processor=processor)."
            )
        return self.tokens
