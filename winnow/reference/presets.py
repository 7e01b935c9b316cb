"""Sizes of the reference models."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.core.errors import WinnowError


@dataclass(frozen=True)
class Preset:
    """A CLIP-style tower and a Llama-type language model of one width.

    `image` / `patch` gives the grid: 224 / 14 → 256 visual tokens, 336 / 14 → 576.
    """

    name: str
    image: int
    patch: int
    width: int
    tower_layers: int
    tower_heads: int
    layers: int
    heads: int
    inner: int  # of the language model's gated MLP; the tower's is 4 × width

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch

    @property
    def visual_tokens(self) -> int:
        return self.grid**2


PRESETS = {
    "small": Preset("small", 224, 14, 192, tower_layers=6, tower_heads=3, layers=8, heads=4, inner=512),
    "base": Preset("base", 336, 14, 256, tower_layers=8, tower_heads=4, layers=8, heads=8, inner=704),
    "micro": Preset("micro", 224, 28, 64, tower_layers=3, tower_heads=2, layers=3, heads=2, inner=128),
}


def preset(name: str) -> Preset:
    """The preset of this name ("micro" is for the tests of the recipe; it is too small to be useful)."""
    if name not in PRESETS:
        raise WinnowError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
