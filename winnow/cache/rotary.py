"""Rotary positions: turning keys that have their phase already to other positions."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError

_WHOLE = "full_attention"  # the layers whose cache can be compressed


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of a language model.

    Attributes:
        frequencies: `[r]` of each rotated pair.
        interleaved: whether a pair is two neighbours; else its halves lie r apart.
        axes: `[r]` which of three axes (time, height, width) turns each pair; None where positions are numbers.
    """

    frequencies: Float[Tensor, " r"]
    interleaved: bool = False
    axes: Int[Tensor, " r"] | None = None

    def turn(
        self, x: Float[Tensor, "b g n d"], shift: Int[Tensor, "#b #g n"] | Int[Tensor, "#b #g n 3"]
    ) -> Float[Tensor, "b g n d"]:
        """Keys or queries as they would be `shift` positions later. A shift of 0 leaves the bits as they are.

        Args:
            shift: along all axes, or along each of three.
        """
        shift = shift.to(self.frequencies.device, torch.float32)
        if shift.ndim < x.ndim:
            angle = shift[..., None] * self.frequencies
        elif self.axes is not None:
            angle = shift[..., self.axes] * self.frequencies
        else:
            raise WinnowError(f"positions are numbers here, and a shift of shape {tuple(shift.shape)} has three axes.")
        return self._rotated(x, angle.cos(), angle.sin())

    def turn_on_average(self, x: Float[Tensor, "*lanes d"], shifts: Int[Tensor, " s"]) -> Float[Tensor, "*lanes d"]:
        """The mean of the same keys or queries at all these shifts."""
        angle = shifts[:, None].to(self.frequencies.device, torch.float32) * self.frequencies
        return self._rotated(x, angle.cos().mean(0), angle.sin().mean(0))

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        r = self.frequencies.shape[0]
        turned, rest = x[..., : 2 * r].float(), x[..., 2 * r :]
        if self.interleaved:
            a, b = turned[..., ::2], turned[..., 1::2]
            made = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned[..., :r], turned[..., r:]
            made = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([made.to(x.dtype), rest], -1)

    def only(self, pairs: Sequence[int]) -> "Rotary":
        """The same rotation of some pairs alone: the time of a phase in time, height and width.

        What the other pairs hold keeps its bits.
        """
        wanted = torch.zeros_like(self.frequencies, dtype=torch.bool)
        wanted[list(pairs)] = True
        return replace(self, frequencies=self.frequencies.where(wanted, 0))

    @staticmethod
    def of(lm: Any, attention: Any) -> "Rotary | None":
        """The rotation of a model, compared with its own function on random vectors; None if it is another one."""
        rotary = getattr(lm, "rotary_emb", None)
        frequencies, kind = getattr(rotary, "inv_freq", None), getattr(rotary, "rope_type", "default")
        named: dict[str, Any] = {}
        if isinstance(kind, dict):  # a rotation for each kind of layer
            frequencies, kind = getattr(rotary, f"{_WHOLE}_inv_freq", None), kind.get(_WHOLE, "default")
            named = {"layer_type": _WHOLE}
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        size = getattr(attention, "head_dim", None)
        if frequencies is None or apply is None or size is None or 2 * frequencies.shape[0] > size:
            return None
        if kind in ("dynamic", "longrope"):
            return None
        x = torch.randn(1, 1, 4, size, generator=torch.Generator().manual_seed(0)).to(frequencies.device)
        at = torch.arange(4, device=frequencies.device)[None]

        def at_positions(by: int) -> Tensor:
            embedding: Any = rotary
            return apply(x, x, *(_one_axis(e) for e in embedding(x, position_ids=_axes(rotary, at + by), **named)))[0]

        try:
            own = [at_positions(0), at_positions(7)]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        axes = _axes_of(rotary, x, frequencies.shape[0]) if hasattr(rotary, "mrope_section") else None
        for interleaved in (False, True):
            made = Rotary(frequencies.float(), interleaved, axes)
            if torch.allclose(made.turn(own[0], torch.full((1, 1, 4), 7)), own[1], atol=1e-4):
                return made
        return None


def _axes(rotary: Any, positions: Tensor) -> Tensor:
    """Positions as the embedding takes them: three equal axes where it knows sections."""
    return positions.expand(3, 1, -1) if hasattr(rotary, "mrope_section") else positions


def _axes_of(rotary: Any, x: Tensor, pairs: int) -> Tensor | None:
    """`[r]` the axis that turns each pair; None where it is not one alone."""
    moved = []
    for axis in range(3):
        at = torch.zeros(3, 1, 1, dtype=torch.int64, device=x.device)
        at[axis] = 1
        moved.append(_one_axis(rotary(x, position_ids=at)[1])[0, 0, :pairs] != 0)
    found = torch.stack(moved)
    return found.int().argmax(0) if bool((found.sum(0) == 1).all()) else None


def _one_axis(embedding: Tensor) -> Tensor:
    return embedding[0] if embedding.ndim == 4 else embedding
