"""Mixed precision: some tokens of a cached tensor as integers of more bits, the others as integers of fewer."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from winnow.parts.forms import Along, Form, Lines, lines_of
from winnow.parts.quantize import Quantized


@dataclass(frozen=True, eq=False)
class Scaled(Form):
    """Lines that were divided by a scale for each of their places, so that large channels leave room to the others."""

    form: Form
    scale: Float[Tensor, "b 1 n"]

    @staticmethod
    def of(lines: Float[Tensor, "b r n"], bits: int) -> "Scaled":
        """The scale of a channel is the root of its largest magnitude."""
        most = lines.float().abs().amax(1, keepdim=True).sqrt()
        scale = most.masked_fill(most == 0, 1).to(lines.dtype)
        return Scaled(Quantized.of(lines.float() / scale.float(), bits, scales=lines.dtype, dtype=lines.dtype), scale)

    def read(self) -> Float[Tensor, "b r n"]:
        return (self.form.read().float() * self.scale.float()).to(self.scale.dtype)


@dataclass(frozen=True, eq=False)
class Mixed(Form):
    """A tensor `[b, G, n, d]`: each token among those of more bits or of fewer.

    Attributes:
        high, low: tokens of either kind, in their order, those of shorter samples filled up; None if there are none.
        kept: which tokens are of the first kind.
    """

    high: Form | None
    low: Form | None
    kept: Bool[Tensor, "b n"]

    @staticmethod
    def of(x: Float[Tensor, "b g n d"], kept: Bool[Tensor, "b n"], along: Along, bits: tuple[int, int]) -> "Mixed":
        """Every channel over its tokens as one group, or every token over the scaled channels of all heads.

        Args:
            bits: of the kept tokens, and of the others.
        """
        high, low = (_of_some(x, some, along, b) for some, b in zip((kept, ~kept), bits, strict=True))
        return Mixed(high, low, kept)

    def read(self) -> Float[Tensor, "b g n d"]:
        parts = [form.read() for form in (self.high, self.low) if form is not None]
        first = parts[0].shape[2] if self.high is not None else 0
        place = torch.where(self.kept, self.kept.cumsum(1) - 1, first + (~self.kept).cumsum(1) - 1)
        whole = torch.cat(parts, 2)
        return whole.gather(2, place[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))


def _of_some(x: Tensor, some: Bool[Tensor, "b n"], along: Along, bits: int) -> Lines | None:
    counts = some.sum(1)
    most = int(counts.max())
    if not most:
        return None
    # A sample with fewer is filled up with one of its own, so that no range changes.
    index = torch.argsort((~some).to(torch.uint8), dim=1, stable=True)[:, :most]
    index = torch.where(torch.arange(most, device=x.device) < counts[:, None], index, index[:, :1])
    rows = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    lines = lines_of(rows, along)
    return Lines(Quantized.of(lines, bits) if along == "tokens" else Scaled.of(lines, bits), x.shape[1], along)
