"""PictureSizes: to what size an image processor brings pictures that keep their own resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from winnow.parts.whole_tokens import grid_within

# Image processors of transformers whose rule this is: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, and the Omni models.
KNOWN = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")


@dataclass(frozen=True)
class PictureSizes:
    """Sides become whole tokens, and their product lies between two numbers of pixels.

    Attributes:
        side: pixels of one side of a token.
        least, most: pixels of a picture as the model sees it.
    """

    side: int
    least: int
    most: int

    @staticmethod
    def of(processor: Any, side: int | None) -> PictureSizes | None:
        """The sizes of a processor; None where its rule is not known, or is for tokens of another side.

        Args:
            side: pixels of one side of a token of the model.
        """
        images = getattr(processor, "image_processor", processor)
        if side is None or type(images).__name__ not in KNOWN or not images.do_resize:
            return None
        least, most = (_entry(images.size, name) for name in ("shortest_edge", "longest_edge"))
        if images.patch_size * images.merge_size != side or least is None or most is None:
            return None
        return PictureSizes(side, least, most)

    @property
    def fewest(self) -> int:
        """Tokens of the smallest picture."""
        return -(-self.least // self.side**2)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a picture."""
        side = self.side
        high, wide = round(height / side), round(width / side)
        if high * wide * side**2 > self.most:
            high, wide = grid_within(height, width, self.most, side)
        elif high * wide * side**2 < self.least:
            by = math.sqrt(self.least / (height * width))
            high, wide = math.ceil(height * by / side), math.ceil(width * by / side)
        return high, wide


def _entry(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
    return value if isinstance(value, int) and value > 0 else None
