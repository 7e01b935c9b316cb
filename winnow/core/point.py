"""Points: where a step acts, in the order of the data."""

from __future__ import annotations

import re
from dataclasses import dataclass

from winnow.core.errors import WinnowError

ORDER = ("prompt", "frames", "pixels", "blocks", "features", "projected", "layers", "kv", "decode")
INDEXED = {"blocks", "layers", "kv"}
PARTS = {"mlp": ("blocks", "layers")}
STAGE = {
    "prompt": "input",
    "frames": "input",
    "pixels": "input",
    "blocks": "encoder",
    "features": "connector",
    "projected": "connector",
    "layers": "decoder",
    "kv": "cache",
    "decode": "decoding",
}
AHEAD = ("prompt", "frames", "pixels")  # of the processor
# What does the same in models that do not offer a point.
INSTEAD = {
    "prompt": "leave pictures out of the messages",
    "pixels": "cut and scale pictures ahead of the processor",
    "decode": "give a KVStep at kv[k] with when=('decode',), which acts for each decoded token",
}


@dataclass(frozen=True)
class Point:
    """`features`, `projected`, `layers[3]`, …: `layers[k]` is before LM layer k, `blocks[k]` before vision block k.

    `blocks[k].mlp` is inside vision block k, between its attention and its MLP; `layers[k].mlp` likewise.
    """

    name: str
    index: int | None = None
    part: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ORDER:
            raise WinnowError(f"Unknown point {self.name!r}; points are {', '.join(ORDER)}.")
        if (self.index is not None) != (self.name in INDEXED):
            needs = "needs an index, as in layers[2]" if self.name in INDEXED else "takes no index"
            raise WinnowError(f"Point {self.name!r} {needs}.")
        if self.part is not None and self.name not in PARTS.get(self.part, ()):
            raise WinnowError(f"Point {self.name!r} has no part {self.part!r}; blocks and layers have the part mlp.")

    @staticmethod
    def of(text: str | Point) -> Point:
        if isinstance(text, Point):
            return text
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?(?:\.(\w+))?", text)
        if match is None:
            raise WinnowError(f"Cannot read the point {text!r}; write for example projected or layers[2].")
        return Point(match[1], None if match[2] is None else int(match[2]), match[3])

    @property
    def kind(self) -> str:
        """The point without its index, as models offer it: `layers`, `blocks.mlp`."""
        return self.name if self.part is None else f"{self.name}.{self.part}"

    @property
    def instead(self) -> str:
        """What to do in the place of a step here, where a model does not offer the point; else nothing."""
        return INSTEAD.get(self.name, "")

    @property
    def stage(self) -> str:
        """The papers' word: input, encoder, connector, decoder, cache or decoding."""
        return STAGE[self.name]

    @property
    def rank(self) -> tuple[float, ...]:
        """Sorts points along the data. `projected` comes before `layers[0]`, and both act at the same place."""
        index = -1 if self.index is None else self.index
        return (ORDER.index(self.name), index if self.part is None else index + 0.5)

    def __str__(self) -> str:
        text = self.name if self.index is None else f"{self.name}[{self.index}]"
        return text if self.part is None else f"{text}.{self.part}"
