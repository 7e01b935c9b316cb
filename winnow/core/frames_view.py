"""FramesView: what a step at `frames` sees. The frames of videos before any processor or model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float, UInt8
from torch import Tensor

from winnow.core.ahead_view import SeveralAhead


@dataclass(frozen=True)
class FramesView(SeveralAhead):
    """The frames of one video, of which a step says which enter.

    A budget of this view is a number of frames, or a share of them: `keep.of(view)`.

    Attributes:
        pixels: `[1, T, h, w, 3]` small pictures of the frames.
        times: `[1, T]` seconds from the first frame of the file, ascending.
        features: `[1, T, D]` what the caller knows of each frame, or None.
        seed: of this view's own random numbers; the global generator is never used.
        module: what the method's `build` made; None if it made nothing.
        notes: what the step records.
    """

    point: ClassVar[str] = "frames"
    sees: ClassVar[str] = "pixels, times and features"

    pixels: UInt8[Tensor, "b t h w 3"]
    times: Float[Tensor, "b t"]
    features: Float[Tensor, "b t d"] | None = None
    seed: int = 0
    module: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
