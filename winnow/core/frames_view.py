"""FramesView: what a step at `frames` sees. The frames of videos before any processor or model."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.signal import Signal


@dataclass(frozen=True)
class FramesView:
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

    pixels: UInt8[Tensor, "b t h w 3"]
    times: Float[Tensor, "b t"]
    features: Float[Tensor, "b t d"] | None = None
    seed: int = 0
    module: Any = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, signal: Signal) -> Tensor:
        raise WinnowError(
            f"A step at frames cannot see {signal}: no model has run. It sees pixels, times and features."
        )

    @property
    def b(self) -> int:
        return self.pixels.shape[0]

    @property
    def n(self) -> int:
        """Frames."""
        return self.pixels.shape[1]

    @property
    def n_visual(self) -> int:
        """Frames: what a share of a budget is a share of."""
        return self.n

    def rand(self, *shape: int) -> Float[Tensor, "..."]:
        """Uniform numbers in [0, 1), `[b, *shape]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(*shape, generator=generator).to(self.pixels.device).expand(self.b, *shape)
