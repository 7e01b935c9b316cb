"""Signals of a sound: how loud it is behind each token, and what its encoder attends to."""

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.signal import Signal, Site, block_index
from winnow.signals.attention import column_mean
from winnow.signals.vision import Pixels, TowerAttention


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


@dataclass(frozen=True)
class SoundAttention(Signal):
    """Attention that each token of the sound beside a video receives in a layer of the encoder of sounds.

    `[b, A]`, fp32, in the order of time; A is 0 where the prompt has no sound. It is the sum over all queries that can
    see the token, and the mean over heads: encoders may attend inside stretches of a sound, and in a short one each
    token would have a larger mean. A token has the mean over the frames that are pooled into it.

    Args:
        layer: of the encoder of sounds; negative counts from the end.
    """

    per: ClassVar[Literal["token", "item"]] = "item"
    beside: ClassVar[bool] = True
    layer: int = -1

    def resolve(self, info: ModelInfo) -> Self:
        if not info.sound_depth:
            raise UnsupportedError(
                f"winnow sees no encoder of sounds of {info.model}, so nothing is heard beside a video; use a method "
                "that looks at the video alone."
            )
        return self._with(layer=block_index(self.layer, info.sound_depth, f"the encoder of sounds of {info.model}"))

    def site(self, info: ModelInfo) -> Site:
        return Site("sound", self.layer)

    def read(self, seen: TowerAttention) -> Float[torch.Tensor, "t n"]:
        q, k, scaling = seen.logits()
        return column_mean(q, k, scaling).mean(1) * q.shape[2]

    def sample(self, generator: torch.Generator, b: int, n: int) -> torch.Tensor:
        return torch.rand(b, 120, generator=generator)
