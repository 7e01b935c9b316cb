"""What quantisation misses, kept beside it: outliers of each line, and a matrix of low rank for each head."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.parts.forms import Form
from winnow.parts.quantize import Quantized, quantized_naive


@dataclass(frozen=True, eq=False)
class Spiked(Form):
    """Lines `[b, r, n]` of which the outliers are kept apart."""

    rest: Quantized
    value: Float[Tensor, "b r k"]
    at: Int[Tensor, "b r k"]

    @staticmethod
    def of(
        lines: Float[Tensor, "b r n"], each: int, bits: int, group: int, held: torch.dtype, last: int = 0
    ) -> "Spiked":
        """The `each` smallest and largest entries kept, and the last ones; the mean of their line is in their place."""
        n = lines.shape[2]
        sides = ((min(each, n - n // 2), False), (min(each, n // 2), True))
        at = torch.cat([lines.topk(k, dim=2, largest=largest).indices for k, largest in sides], 2)
        at = torch.cat([at, torch.arange(n - last, n, device=at.device).expand(*at.shape[:2], -1)], 2)
        mean = lines.float().nanmean(2, keepdim=True).expand(at.shape)
        rest = Quantized.of(lines.float().scatter(2, at, mean), bits, group, held, lines.dtype)
        return Spiked(rest, lines.gather(2, at), at.to(torch.int16 if n <= 2**15 else torch.int32))

    def read(self) -> Float[Tensor, "b r n"]:
        return self.rest.read().scatter(2, self.at.long(), self.value)


@dataclass(frozen=True, eq=False)
class Repaired(Form):
    """A tensor `[b, G, n, d]`, and for each head a matrix of low rank, left · rightᵀ, that is added to it."""

    base: Form
    left: Float[Tensor, "b g n r"]
    right: Float[Tensor, "b g d r"]

    @staticmethod
    def of(x: Float[Tensor, "b g n d"], base: Form, start: Tensor, loops: int, held: torch.dtype) -> "Repaired":
        """What the base misses, by power iterations from `start`, `[G, d, r]`."""
        rest = x.float() - base.read().float()
        right = start.to(x.device).expand(x.shape[0], -1, -1, -1)
        left = x.new_zeros(*x.shape[:3], start.shape[2])
        for loop in range(loops):
            to_come = loops - 1 - loop
            # The last pass needs orthogonal columns; of many passes, some do, or all columns become one.
            left = rest @ (right if to_come % 3 else torch.linalg.qr(right).Q)
            left = left if to_come else torch.linalg.qr(left).Q
            right = rest.transpose(2, 3) @ left
        return Repaired(base, left.to(held), right.to(held))

    def read(self) -> Float[Tensor, "b g n d"]:
        base = self.base.read()
        return (base.float() + self.left.float() @ self.right.float().transpose(2, 3)).to(base.dtype)


def spiked_naive(line: list[float], each: int, bits: int, group: int = 0) -> list[float]:
    """What is read of one line, from the definition: the reference that `Spiked` is tested against."""
    order = sorted(range(len(line)), key=lambda i: line[i])
    out = {*order[:each], *order[len(line) - each :]}
    mean = sum(line) / len(line)
    rest = quantized_naive([mean if i in out else x for i, x in enumerate(line)], bits, group)
    return [line[i] if i in out else x for i, x in enumerate(rest)]
