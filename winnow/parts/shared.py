"""Directions that two layers share, and the lengths that each of them holds."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.parts.forms import Form


def slerp(
    u: Float[Tensor, "b u n w"], v: Float[Tensor, "b u n w"], angle: Float[Tensor, "b u n"], t: float
) -> Float[Tensor, "b u n w"]:
    """The direction at t of the way from u to v, which are of length 1 and lie `angle` apart."""
    sine, along = angle.sin()[..., None], angle[..., None]
    straight = torch.nn.functional.normalize((1 - t) * u + t * v, dim=3)
    bent = (torch.sin((1 - t) * along) * u + torch.sin(t * along) * v) / sine.clamp_min(1e-6)
    return torch.where(sine < 1e-6, straight, bent)


@dataclass(frozen=True, eq=False)
class Shared(Form):
    """What two layers hold together: the directions `[b, U, n, w]`, and which tokens are not merged."""

    direction: Form
    at: Int[Tensor, "b u m"] | None
    moved: dict[tuple[int, ...], "Shared"] = field(default_factory=dict)

    def rows(self, move: Callable[[Tensor], Tensor]) -> "Shared":
        """The second layer that moves its samples takes what the first one made."""
        order = tuple(move(torch.arange(next(self.tensors()).shape[0])[:, None])[:, 0].tolist())
        if order in self.moved:
            return self.moved.pop(order)
        at = None if self.at is None else move(self.at)
        self.moved[order] = Shared(self.direction.rows(move), at)
        return self.moved[order]


@dataclass(frozen=True, eq=False)
class Half(Form):
    """Keys or values of one of the two layers."""

    shared: Shared
    size: Float[Tensor, "b u n"]
    kept: Float[Tensor, "b u m w"] | None
    heads: int

    def restored(self) -> Float[Tensor, "b u n w"]:
        """Without the tokens that are not merged."""
        return self.shared.direction.read() * self.size[..., None]

    def read(self) -> Float[Tensor, "b g n d"]:
        x = self.restored()
        if self.kept is not None:
            x = x.scatter(2, self.shared.at[..., None].long().expand_as(self.kept), self.kept)  # type: ignore[index]
        if x.shape[1] == self.heads:
            return x
        return x[:, 0].unflatten(2, (self.heads, -1)).transpose(1, 2)
