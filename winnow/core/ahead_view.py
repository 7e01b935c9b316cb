"""AheadView: what the views of steps ahead of the processor share. No model has run when they are seen."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.signal import Signal


class AheadView:
    """A view with `pixels` `[b, …]` and a `seed`, and without signals.

    Attributes:
        point: where its steps act.
        sees: what they see, for the refusal of a signal.
    """

    point: ClassVar[str]
    sees: ClassVar[str]
    pixels: Any
    seed: int

    def __getitem__(self, signal: Signal) -> Tensor:
        raise WinnowError(f"A step at {self.point} cannot see {signal}: no model has run. It sees {self.sees}.")

    @property
    def b(self) -> int:
        return self.pixels.shape[0]

    def rand(self, *shape: int) -> Float[Tensor, "..."]:
        """Uniform numbers in [0, 1), `[b, *shape]`."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(*shape, generator=generator).to(self.pixels.device).expand(self.b, *shape)


class SeveralAhead(AheadView):
    """One of several things, `pixels` `[b, n, …]`, of which a step says which enter."""

    @property
    def n(self) -> int:
        """Frames, or pictures."""
        return self.pixels.shape[1]

    @property
    def n_visual(self) -> int:
        """The same: what a share of a budget is a share of."""
        return self.n
