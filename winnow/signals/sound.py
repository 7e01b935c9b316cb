"""Signals of a sound: how loud it is behind each token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float

from winnow.core.signal import Signal, Site
from winnow.signals.vision import Pixels


@dataclass(frozen=True)
class SoundLevel(Signal):
    """The mean of the log-mel features behind each token, as the encoder is given them: `[b, N]`, at least fp32.

    What the encoder is given of a picture are its pixels, and then it is their mean.
    """

    def site(self, info: object) -> Site:
        return Site("pixels")

    def read(self, seen: Pixels) -> Float[torch.Tensor, " cells"]:
        wide = torch.promote_types(seen.patches.dtype, torch.float32)
        return seen.patches.flatten(1).to(wide).mean(1)
