"""Quantisation of lines in groups: packed integers, and beside them the smallest value and the step of each group.

Asymmetric and uniform: a value of a group is `low + code · step`, with 2^bits codes from its smallest to its largest.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from winnow.parts.forms import Form

_PLANES = (8, 4, 2, 1)


@dataclass(frozen=True, eq=False)
class Quantized(Form):
    """Lines `[b, r, n]` as integers.

    Attributes:
        codes: packed; groups lie behind one another, the last one filled up.
        low, step: `[b, r, groups]`.
        bits: of one integer.
        group: values of a group.
        length: n.
        dtype: of what is read.
    """

    codes: UInt8[Tensor, "b r bytes"]
    low: Float[Tensor, "b r groups"]
    step: Float[Tensor, "b r groups"]
    bits: int
    group: int
    length: int
    dtype: torch.dtype

    @staticmethod
    def of(
        x: Float[Tensor, "b r n"],
        bits: int,
        group: int = 0,
        scales: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Quantized":
        """Quantised lines; those of constant groups are kept exactly.

        Args:
            group: values of a group, the last of which may have fewer; 0: all of a line.
            scales: in which `low` and `step` are held; by default `dtype`.
            dtype: of what is read; by default that of x.
        """
        n = x.shape[2]
        group = min(group, n) if group else n
        short = -n % group
        # What fills up the last group repeats a value of it, so that its range stays.
        whole = x.float() if not short else torch.cat([x, x[..., -1:].expand(-1, -1, short)], 2).float()
        whole = whole.unflatten(2, (-1, group))
        least, most = whole.aminmax(dim=3)
        dtype = x.dtype if dtype is None else dtype
        scales = dtype if scales is None else scales
        low = least.to(scales)
        step = ((most - low.float()) / (2**bits - 1)).to(scales)
        place = (whole - low.float()[..., None]) / step.float().masked_fill(step == 0, 1)[..., None]
        codes = place.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        return Quantized(packed(codes.flatten(2), bits), low, step, bits, group, n, dtype)

    def read(self) -> Float[Tensor, "b r n"]:
        groups = self.low.shape[2]
        codes = unpacked(self.codes, self.bits, groups * self.group).unflatten(2, (groups, self.group))
        made = codes.float().mul_(self.step.float()[..., None]).add_(self.low.float()[..., None])
        return made.flatten(2)[..., : self.length].to(self.dtype)


def packed(codes: Integer[Tensor, "*lines n"], bits: int) -> UInt8[Tensor, "*lines bytes"]:
    """Integers below 2^bits, without room between them.

    Their binary digits are stored in planes of 8, 4, 2 or 1 digits (3 = 2 + 1). A byte of a plane holds integers that
    lie far apart, so that both ways are a few operations on long runs.
    """
    n, planes, start = codes.shape[-1], [], 0
    for width in _planes(bits):
        per = 8 // width
        size = -(-n // per)
        digits = ((codes >> start) & (2**width - 1)).to(torch.uint8)
        if per * size > n:
            digits = torch.nn.functional.pad(digits, (0, per * size - n))
        plane = digits[..., :size].clone()
        for i in range(1, per):
            plane |= digits[..., i * size : (i + 1) * size] << (width * i)
        planes.append(plane)
        start += width
    return torch.cat(planes, -1) if len(planes) > 1 else planes[0]


def unpacked(bytes_: UInt8[Tensor, "*lines bytes"], bits: int, n: int) -> UInt8[Tensor, "*lines n"]:
    """The n integers of each line."""
    made, at, start = None, 0, 0
    for width in _planes(bits):
        per = 8 // width
        size = -(-n // per)
        plane = bytes_[..., at : at + size]
        digits = [(plane >> (width * i)) & (2**width - 1) for i in range(per)] if per > 1 else [plane]
        part = torch.cat(digits, -1)[..., :n]
        made = part if made is None else made | (part << start)
        at, start = at + size, start + width
    return made  # type: ignore[return-value]


def _planes(bits: int) -> tuple[int, ...]:
    return tuple(width for width in _PLANES if bits & width)


def quantized_naive(line: list[float], bits: int, group: int = 0) -> list[float]:
    """What is read of one line, from the definition: the reference that `Quantized` is tested against."""
    group, found = group or len(line), []
    for start in range(0, len(line), group):
        own = line[start : start + group]
        low, step = min(own), (max(own) - min(own)) / (2**bits - 1)
        found += [low + round((x - low) / step) * step if step else low for x in own]
    return found


@dataclass(frozen=True, eq=False)
class Float8(Form):
    """A tensor in fp8 (e4m3); what lies beyond its largest number, 448, becomes that.

    Attributes:
        bits: as bytes, because few operations know the type.
        dtype: of what is read.
    """

    bits: UInt8[Tensor, "*shape"]
    dtype: torch.dtype

    @staticmethod
    def of(x: Float[Tensor, "*shape"]) -> "Float8":
        most = torch.finfo(torch.float8_e4m3fn).max
        return Float8(x.clamp(-most, most).to(torch.float8_e4m3fn).view(torch.uint8), x.dtype)

    def read(self) -> Float[Tensor, "*shape"]:
        return self.bits.view(torch.float8_e4m3fn).to(self.dtype)
