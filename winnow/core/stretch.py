"""Stretch: rotary frequencies for sequences longer than those of training (YaRN)."""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import WinnowError


@dataclass(frozen=True)
class Stretch:
    """What becomes of the rotation of a language model, for all tokens of a request.

    Pairs that turn less than `slow` times within the window have their frequency divided by the scale. Those that turn
    more than `fast` times keep theirs; between the two, it goes linearly in their turns.

    Attributes:
        scale: from 1, at which nothing changes.
        window: tokens over which turns are counted.

    Raises:
        WinnowError: a scale below 1, an empty window, or bounds that are not in order.
    """

    scale: float
    window: int
    slow: float = 1.0
    fast: float = 32.0

    def __post_init__(self) -> None:
        if not 1 <= self.scale < math.inf or self.window < 1 or not 0 <= self.slow < self.fast:
            raise WinnowError(
                f"scale={self.scale}, window={self.window}, slow={self.slow}, fast={self.fast}; allowed: a scale from "
                "1, a window from 1, and 0 ≤ slow < fast."
            )

    @property
    def temperature(self) -> float:
        """What cosines and sines are multiplied with, so that attention over more tokens is as sharp."""
        return 0.1 * math.log(self.scale) + 1

    def frequencies(self, own: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
        """The frequencies of the pairs, from those of the model."""
        if self.scale == 1:
            return own
        turns = self.window * own.double() / (2 * math.pi)
        stay = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        return (own.double() * ((1 - stay) / self.scale + stay)).to(own.dtype)


def frequencies_naive(own: list[float], stretch: Stretch) -> list[float]:
    """The same, pair by pair, from wavelengths."""
    found = []
    for theta in own:
        turns = stretch.window / (2 * math.pi / theta)
        ramp = (turns - stretch.slow) / (stretch.fast - stretch.slow)
        ramp = 0.0 if turns < stretch.slow else 1.0 if turns > stretch.fast else ramp
        found.append((1 - ramp) * theta / stretch.scale + ramp * theta)
    return found
