"""Bits: yes and no of many steps, eight to a byte."""

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

_BITS = 8


def packed(flags: Bool[Tensor, "*lanes n"]) -> UInt8[Tensor, "*lanes bytes"]:
    """Flags in as few bytes as hold them; the last byte is filled with False."""
    n = flags.shape[-1]
    whole = torch.nn.functional.pad(flags, (0, -n % _BITS)).unflatten(-1, (-1, _BITS))
    return (whole.to(torch.uint8) << torch.arange(_BITS, dtype=torch.uint8, device=flags.device)).sum(
        -1, dtype=torch.uint8
    )


def unpacked(bytes_: UInt8[Tensor, "*lanes bytes"], n: int) -> Bool[Tensor, "*lanes n"]:
    """The first n flags."""
    at = torch.arange(_BITS, dtype=torch.uint8, device=bytes_.device)
    return ((bytes_[..., None] >> at) & 1).bool().flatten(-2)[..., :n]
